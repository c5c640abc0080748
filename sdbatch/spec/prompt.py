"""How rows become prompts."""

from __future__ import annotations

from pydantic import Field

from sdbatch.spec.section import Section


class Prompt(Section):
    """How rows become prompts."""

    max_characters: int = Field(4000, ge=1, description="A row with a longer prompt is quarantined")
