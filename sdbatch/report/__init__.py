"""Pages for people, made from the ledger and the stored pictures alone."""

from sdbatch.report.page import Report, write_report

__all__ = ["Report", "write_report"]
