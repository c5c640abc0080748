"""What all sections of a job spec have in common."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _without_credentials(uri: str) -> str:
    if re.match(r"[^/@]*://[^/]*@", uri):
        raise ValueError("holds credentials, which don't belong in a job spec; give them by the environment")
    return uri


Uri = Annotated[str, Field(min_length=1), AfterValidator(_without_credentials)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
