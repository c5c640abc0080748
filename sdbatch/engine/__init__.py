"""The part that runs on Ray: planning (``planner``), the pool of generators (``pool``), the run itself (``runner``).

Nothing is imported here, because Ray's workers import this package to read tables, and torch would cost each of
them two seconds.
"""
