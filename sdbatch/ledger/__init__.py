"""The only truth about a job's progress: its plan and its commit records."""

from sdbatch.ledger.commits import CommitRecord, committed_shards, find_commit, put_commit, read_commits
from sdbatch.ledger.plan import (
    Job,
    Shard,
    find_job,
    job_fingerprint,
    read_job,
    read_shards,
    read_slice,
    refuse_changes,
    write_job,
    write_slice,
)
from sdbatch.ledger.progress import Status, failures, read_status
from sdbatch.ledger.verify import Verdict, verify

__all__ = [
    "CommitRecord",
    "Job",
    "Shard",
    "Status",
    "Verdict",
    "committed_shards",
    "failures",
    "find_commit",
    "find_job",
    "job_fingerprint",
    "put_commit",
    "read_commits",
    "read_job",
    "read_shards",
    "read_slice",
    "read_status",
    "refuse_changes",
    "verify",
    "write_job",
    "write_slice",
]
