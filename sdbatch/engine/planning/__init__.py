"""From a spec and a table to a plan; nothing is imported here, for Ray's workers read tables."""
