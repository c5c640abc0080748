"""What this machine has: in a container its limits, not those of the machine below."""

from __future__ import annotations

from ray._common.utils import get_system_memory
from ray._private.utils import get_num_cpus


def cpus() -> int:
    """Cores that may be used here, at least one: by the cgroup's quota, where there is one."""
    return max(int(get_num_cpus(override_docker_cpu_warning=True)), 1)


def memory_bytes() -> int:
    """Memory that may be used here: by the cgroup's limit, where there is one."""
    return int(get_system_memory())
