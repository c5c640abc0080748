"""How rows become prompts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sdbatch.spec.section import Section, Uri


class Prompt(Section):
    """How rows become prompts."""

    template: str | None = Field(
        None,
        min_length=1,
        max_length=20_000,
        description="What every row's prompt is made from: text with {columns}, {a|b} choices and __wildcards__",
    )
    template_column: str | None = Field(
        None, min_length=1, description="The column that holds each row's own template, in place of one for all"
    )
    wildcards: Uri | None = Field(
        None, description="The folder of the files that __wildcards__ name, wherever input.uri may lie"
    )
    expansion: Literal["sample", "all"] = Field(
        "sample", description="Draw prompts from the template by chance, or make all that it can say"
    )
    samples: int = Field(1, ge=1, le=10_000, description="Prompts that are drawn for each row")
    wildcard_seed: int = Field(
        0, ge=0, lt=2**63, description="What is drawn depends on this, the row's id and the template alone"
    )
    max_characters: int = Field(4000, ge=1, description="A row with a longer prompt is quarantined")

    @model_validator(mode="after")
    def _go_together(self) -> Prompt:
        if self.template is not None and self.template_column is not None:
            raise ValueError("has both template and template_column; one of them says what the prompt is made from")
        if not self.templated:
            for name in ("wildcards", "expansion", "samples", "wildcard_seed"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"has {name}, which only templates take; give template or template_column")
        if self.expansion == "all" and self.samples > 1:
            raise ValueError("has samples, and expansion: all, which makes every prompt once")
        return self

    @property
    def templated(self) -> bool:
        return self.template is not None or self.template_column is not None
