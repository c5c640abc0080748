"""The output as a data set: the card that tells what it is."""

from sdbatch.dataset.card import Card, card_text, write_card
from sdbatch.dataset.job_card import write_job_card

__all__ = ["Card", "card_text", "write_card", "write_job_card"]
