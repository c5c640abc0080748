"""Who is told how a job ended."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from sdbatch.spec.section import Section, Uri

Event = Literal["finish", "failure", "budget"]


class Notify(Section):
    """A webhook: a POST with a JSON body when a job ends."""

    url: Uri | None = Field(None, description="https:// or http:// address that gets the POST; none: nobody is told")
    on: list[Event] = Field(
        ["finish", "failure", "budget"],
        description="Events that are told: the job is complete; it stopped on an error; it reached a limit of its spec",
    )
    secret_env: str | None = Field(
        None,
        description="Name of the environment variable that holds the secret which signs the body (HMAC-SHA256); never "
        "the secret itself",
    )

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:_-]+(?:[/?][\x21-\x7e]*)?", url):
            raise ValueError("should be an address such as https://example.org/hook")
        return url

    @field_validator("secret_env")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name):
            raise ValueError("should be the name of an environment variable, not the secret")
        return name
