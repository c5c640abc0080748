"""Pages for people, made from the ledger and the stored pictures alone."""

from sdbatch.report.gallery import Gallery, write_gallery

__all__ = ["Gallery", "write_gallery"]
