"""The part that runs on Ray: planning, the pool of generators, the run itself."""

from sdbatch.engine.planner import prepare
from sdbatch.engine.runner import Outcome, Snapshot, Watch, plan, run

__all__ = ["Outcome", "Snapshot", "Watch", "plan", "prepare", "run"]
