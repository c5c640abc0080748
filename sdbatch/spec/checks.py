"""What is looked at in every picture that was made, and what happens to one that fails."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sdbatch.spec.section import Section, Uri

OnFail = Literal["tag", "drop", "reroll"]

_MOST_CONCEPTS = 100
_Concept = Annotated[str, Field(min_length=1, max_length=1000)]
_Cosine = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False, strict=True)]

_OWN = "What happens to a picture that fails, if not checks.on_fail"


class ClipScore(Section):
    """How well a picture fits its prompt: the cosine of the two in a CLIP."""

    model: Uri = Field(
        description="builtin:shapes-clip, hf:OWNER/NAME[@REVISION][/FOLDER], or a folder in transformers' CLIP layout, "
        "local or s3://"
    )
    min: _Cosine | None = Field(None, description="A picture with a lower score fails; none does when left out")
    on_fail: OnFail | None = Field(None, description=_OWN)

    @model_validator(mode="after")
    def _can_fail(self) -> Self:
        if self.on_fail is not None and self.min is None:
            raise ValueError("has an on_fail but no min, without which no picture fails")
        return self


class Blank(Section):
    """Pictures of (almost) one colour."""

    min_contrast: float = Field(
        2.0,
        gt=0,
        le=127.5,
        allow_inf_nan=False,
        strict=True,
        description="A picture fails whose levels, 0 to 255, have a lower standard deviation in every colour channel",
    )
    on_fail: OnFail | None = Field(None, description=_OWN)


class NearDuplicates(Section):
    """Pictures that look like one before them in their shard."""

    max_distance: int = Field(
        4,
        ge=0,
        le=31,
        strict=True,
        description="Two pictures are near duplicates whose perceptual hashes differ in at most so many of 64 bits",
    )
    on_fail: OnFail | None = Field(None, description=_OWN)


class Safety(Section):
    """A classifier for what pictures should not show."""

    model: Uri = Field(
        description="A safety checker as diffusers saves it, or a folder that has one, or a CLIP, with concepts; where "
        "they may lie as for clip_score.model"
    )
    concepts: dict[_Concept, _Cosine] = Field(
        default_factory=dict,
        description="For a CLIP: words → the cosine from which on a picture shows them, and fails",
    )
    on_fail: OnFail | None = Field(None, description=_OWN)

    @model_validator(mode="after")
    def _not_too_many(self) -> Self:
        if len(self.concepts) > _MOST_CONCEPTS:
            raise ValueError(f"has {len(self.concepts)} concepts; at most {_MOST_CONCEPTS} are allowed")
        return self


#: Fields of the section that are checks, in the order in which they are told.
CHECKS = ("clip_score", "blank", "near_duplicates", "safety")

#: Columns of the metadata table that a check fills in.
_COLUMNS = {
    "clip_score": ("clip_score",),
    "blank": ("contrast",),
    "near_duplicates": ("phash", "duplicate_of"),
    "safety": ("unsafe_score", "unsafe_concept"),
}


class Checks(Section):
    """Checks on every picture, new seeds for those that fail, the best of several."""

    on_fail: OnFail = Field(
        "tag",
        description="tag: the columns tell; drop: the picture is not stored; reroll: it is made again with new seeds",
    )
    rerolls: int = Field(3, ge=1, le=32, strict=True, description="New seeds that a picture gets at most")
    best_of: int = Field(
        1, ge=1, le=32, strict=True, description="Candidates for each picture, of which the best by clip_score is kept"
    )
    clip_score: ClipScore | None = Field(None, description="How well a picture fits its prompt")
    blank: Blank | None = Field(None, description="Is it (almost) one colour? {} for the defaults")
    near_duplicates: NearDuplicates | None = Field(
        None, description="Does it look like one before it in its shard? {} for the defaults"
    )
    safety: Safety | None = Field(None, description="Does it show what it should not?")

    @model_validator(mode="after")
    def _something_to_check(self) -> Self:
        if not self.names:
            raise ValueError(f"name no check; there is {', '.join(CHECKS)}")
        if self.on_fail != "tag" and self.names == ("clip_score",) and not self.scored:
            raise ValueError(f"have on_fail: {self.on_fail}, but clip_score has no min, without which no picture fails")
        if self.best_of > 1 and self.clip_score is None:
            raise ValueError("have best_of but no clip_score to tell which candidate is the best")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The checks that are in use."""
        return tuple(name for name in CHECKS if getattr(self, name) is not None)

    @property
    def models(self) -> dict[str, str]:
        """The checks that ask a model → where it lies."""
        asking = {"clip_score": self.clip_score, "safety": self.safety}
        return {name: check.model for name, check in asking.items() if check is not None}

    def action(self, name: str) -> OnFail:
        """What happens to a picture that fails a check."""
        own: OnFail | None = getattr(self, name).on_fail
        return own or self.on_fail

    @property
    def rerolling(self) -> bool:
        """Does any check ask for new seeds?"""
        return any(self.action(name) == "reroll" for name in self.names if name != "clip_score" or self.scored)

    @property
    def scored(self) -> bool:
        """Can a picture fail by its score?"""
        return self.clip_score is not None and self.clip_score.min is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """What the metadata table has more for these checks."""
        found = ["failed_checks", *(column for name in self.names for column in _COLUMNS[name])]
        if self.rerolling:
            found.append("rerolls")
        if self.rerolling or self.best_of > 1:
            found += ["seeds_tried", "failed_tried"]
            found += ["scores_tried"] if self.clip_score is not None else []
        return tuple(found)
