"""Who does the work, and when to give up."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from sdbatch.spec.section import Section


class Failures(Section):
    """When to give up."""

    max_failed_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Stop when more than this fraction of the planned images (and more than 10) failed while being "
        "made. Rows refused at plan time do not count",
    )
    max_attempts: int = Field(
        2,
        ge=1,
        le=100,
        description="Times a request is tried that kills its process, once it is alone under suspicion; then it is "
        "quarantined",
    )


_MOST_ACTORS = 10_000
_LARGEST_BATCH = 1024


class Resources(Section):
    """The pool that does the work."""

    actors: int | str = Field(
        1, description="Generator actors, each with the whole model: 4, or 2..16 for as many as there is room for"
    )
    gpus_per_actor: float = Field(0, ge=0, le=8, description="0: on the CPU")
    cpus_per_actor: int = Field(1, ge=1, le=256, description="CPUs, and threads of the model when it runs there")
    batch_size: int | str = Field(
        8, description="Images that the model computes at once; auto: as many as help and fit, decided in the plan"
    )
    usd_per_gpu_hour: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        strict=True,
        description="Price of an hour of one GPU, in US dollars; with gpus_per_actor 0, of an hour of one actor",
    )
    budget_usd: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        strict=True,
        description="Stop, resumably, before all runs of this output together cost more; needs usd_per_gpu_hour",
    )

    @field_validator("actors", mode="before")
    @classmethod
    def _number_or_range(cls, actors: Any) -> int | str:
        known = re.fullmatch(r"([0-9]{1,5})(?:\.\.([0-9]{1,5}))?", str(actors)) if type(actors) in {int, str} else None
        if known is None or not 1 <= int(known[1]) <= int(known[2] or known[1]) <= _MOST_ACTORS:
            raise ValueError(f"should be a number or a range from 1 to {_MOST_ACTORS:,}: write 4 or 2..16")
        return int(actors) if known[2] is None else str(actors)

    @field_validator("batch_size", mode="before")
    @classmethod
    def _number_or_auto(cls, batch: Any) -> int | str:
        if batch != "auto" and (type(batch) is not int or not 1 <= batch <= _LARGEST_BATCH):
            raise ValueError(f"should be a number from 1 to {_LARGEST_BATCH:,}, or auto")
        return batch

    @field_validator("budget_usd")
    @classmethod
    def _has_a_price(cls, budget: float | None, before: ValidationInfo) -> float | None:
        if budget is not None and before.data.get("usd_per_gpu_hour", budget) is None:
            raise ValueError("needs a price to count with: set resources.usd_per_gpu_hour too")
        return budget

    @property
    def at_once(self) -> int:
        """The batch size, once it is a number: ``auto`` is only for the planner."""
        return int(self.batch_size)

    @property
    def usd_per_actor_hour(self) -> float | None:
        """What an hour of one actor costs; None where there is no price."""
        return None if self.usd_per_gpu_hour is None else self.usd_per_gpu_hour * (self.gpus_per_actor or 1)

    @property
    def fewest(self) -> int:
        """Actors that should find room."""
        return int(str(self.actors).partition("..")[0])

    @property
    def most(self) -> int:
        """Actors that are asked for."""
        return int(str(self.actors).rpartition("..")[2])

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_actor > 0 else "cpu"
