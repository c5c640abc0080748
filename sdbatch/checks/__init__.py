"""Checks on what was made: measured beside the model, told in columns, decided by the spec."""

from sdbatch.checks.candidates import Candidate, Looks, candidate_seed, columns, complaint, dropped, kept, wanting
from sdbatch.checks.duplicates import first_alike
from sdbatch.checks.found import FoundChecks, find_checks, load_measures, measures_bytes
from sdbatch.checks.measures import Facts, Measures

__all__ = [
    "Candidate",
    "Facts",
    "FoundChecks",
    "Looks",
    "Measures",
    "candidate_seed",
    "columns",
    "complaint",
    "dropped",
    "find_checks",
    "first_alike",
    "kept",
    "load_measures",
    "measures_bytes",
    "wanting",
]
