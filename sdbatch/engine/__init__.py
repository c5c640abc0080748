"""The part that runs on Ray: planning (``planning``), making (``making``), and the run that does both (``runner``).

Nothing is imported here or in the rooms' own ``__init__``, because Ray's workers import this package to read tables,
and torch would cost each of them two seconds.
"""
