"""The output as a data set: the card that tells what it is, and its export to other forms."""

from sdbatch.dataset.card import Card, card_text, write_card
from sdbatch.dataset.export import Exported, export
from sdbatch.dataset.job_card import write_job_card
from sdbatch.dataset.manifest import Manifest, read_manifest
from sdbatch.dataset.proof import verify_export
from sdbatch.dataset.where import Where

__all__ = [
    "Card",
    "Exported",
    "Manifest",
    "Where",
    "card_text",
    "export",
    "read_manifest",
    "verify_export",
    "write_card",
    "write_job_card",
]
