"""Image requests: from a row of the table to everything that decides a picture's pixels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from sdbatch.prompts.fault import BadValue
from sdbatch.prompts.variants import Variant, Variants
from sdbatch.spec import Generate, JobSpec, SamplerName

MAX_SEED = 2**63 - 1
SIZE_STEP = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """What all requests of a batch have in common."""

    width: int
    height: int
    num_inference_steps: int
    sampler: str
    guided: bool
    chunks: int  # that prompts are read in
    strength: float | None  # None: from pure noise
    masked: bool


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What planning must know of the model."""

    default_size: tuple[int, int]  # width, height in pixels
    repaints: bool = False  # an inpainting model: it needs a picture and a mask
    most_steps: Mapping[str, int] = field(default_factory=dict)  # that a sampler can take


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One picture to make, or, with a ``fault``, one that can't be made and why."""

    image_id: str
    row_id: str
    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    template: str | None = None  # that the prompt was made from
    chunks: int = 1
    init_image: str | None = None
    mask_image: str | None = None
    strength: float | None = None
    fault: str | None = None
    kept: dict[str, str | None] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        return Shape(
            self.width,
            self.height,
            self.num_inference_steps,
            self.sampler,
            self.guidance_scale > 1.0,
            self.chunks,
            self.strength,
            self.mask_image is not None,
        )


def requests_of_row(
    row: Mapping[str, Any],
    index: int,
    spec: JobSpec,
    model: ModelFacts,
    row_id: str,
    id_fault: str | None,
    variants: Variants,
) -> list[ImageRequest]:
    """The requests of one row: ``num_images_per_prompt`` pictures of each of its variants.

    What can't be made is one fault: the row, or one of its variants. ``row`` maps the names of fields and of kept
    columns to cells; ``index`` is the row's place in the table.
    """
    kept = {name: row.get(f"keep:{name}") for name in spec.input.kept}
    try:
        if row.get("fault"):
            raise BadValue(row["fault"])
        if id_fault is not None:
            raise BadValue(id_fault)
        found = list(variants(row, row_id))
    except BadValue as error:
        return [_fault(row, index, spec, model, row_id, _name(row_id, 0, spec), None, kept, error)]
    requests = list[ImageRequest]()
    for number, variant in enumerate(found):
        name, cells, words = _name(row_id, number, spec), {**row, **variant.cells}, {**kept, **variant.words}
        try:
            requests += _requests_of_variant(cells, spec, model, row_id, name, variant, words)
        except BadValue as error:
            requests.append(_fault(cells, index, spec, model, row_id, name, variant.template, words, error))
    if requests[0].fault is not None and len({request.fault for request in requests}) == 1:
        return requests[:1]  # the row itself is at fault
    return requests


def _name(row_id: str, number: int, spec: JobSpec) -> str:
    """What the ids of a variant's images begin with. All ids of a job have as many parts: none can be another's."""
    return f"{row_id}-{number}" if spec.variants else row_id


def _fault(
    row: Mapping[str, Any],
    index: int,
    spec: JobSpec,
    model: ModelFacts,
    row_id: str,
    name: str,
    template: str | None,
    kept: dict[str, str | None],
    error: BadValue,
) -> ImageRequest:
    base = spec.generate
    shown = (row.get("prompt") or "").encode("utf-8", "replace").decode()
    return ImageRequest(
        image_id=f"{name}-0",
        row_id=row_id,
        prompt=shown[: spec.prompt.max_characters],
        negative_prompt="",
        seed=0,
        width=base.width or model.default_size[0],
        height=base.height or model.default_size[1],
        num_inference_steps=base.num_inference_steps,
        guidance_scale=base.guidance_scale,
        sampler=base.sampler,
        template=template or row.get("template") or spec.prompt.template,
        fault=f"row {index + 1}: {error}",
        kept=kept,
    )


def _requests_of_variant(
    row: Mapping[str, Any],
    spec: JobSpec,
    model: ModelFacts,
    row_id: str,
    name: str,
    variant: Variant,
    kept: dict[str, str | None],
) -> list[ImageRequest]:
    """The pictures of one variant, whose cells are in the ``row`` already; ``name`` begins their ids."""
    base, default_size = spec.generate, model.default_size
    prompt = _prompt(row.get("prompt"), spec)
    negative = _text(row.get("negative_prompt"), base.negative_prompt, "negative_prompt", spec)
    count = _whole(row.get("num_images_per_prompt"), base.num_images_per_prompt, "num_images_per_prompt", 1, 10_000)
    width = _size(row.get("width"), base.width or default_size[0], "width", base)
    height = _size(row.get("height"), base.height or default_size[1], "height", base)
    steps = _whole(row.get("num_inference_steps"), base.num_inference_steps, "num_inference_steps", 1, 1000)
    scale = _number(row.get("guidance_scale"), base.guidance_scale, "guidance_scale")
    sampler = _sampler(row.get("sampler"), base.sampler)
    if steps > model.most_steps.get(sampler, steps):
        raise BadValue(f"num_inference_steps is {steps}; {sampler} takes at most {model.most_steps[sampler]}")
    init_image, mask_image = _images(row.get("init_image"), row.get("mask_image"), model)
    strength = _strength(row.get("strength"), base.strength, steps) if init_image else None
    seed = _whole(row.get("seed"), 0, "seed", 0, MAX_SEED) if row.get("seed") else None
    first = variant.prompt * count  # pictures that differ in the matrix alone share their seeds, to be compared
    return [
        ImageRequest(
            image_id=f"{name}-{k}",
            row_id=row_id,
            prompt=prompt,
            template=variant.template,
            negative_prompt=negative,
            seed=image_seed(base.seed, row_id, first + k) if seed is None else (seed + first + k) % (MAX_SEED + 1),
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=scale,
            sampler=sampler,
            init_image=init_image,
            mask_image=mask_image,
            strength=strength,
            kept=kept,
        )
        for k in range(count)
    ]


def image_seed(job_seed: int, row_id: str, k: int) -> int:
    """The seed of a row's k-th picture, below 2^53 so that every JSON reader keeps it exactly.

    It depends on the job's seed and the row's id alone, never on other rows.
    """
    digest = hashlib.blake2b(f"{job_seed}\0{row_id}\0{k}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 11


# -- cells: text as the table holds it, or None ----------------------------------------------------------------

Cell = str | None


def _text(cell: Cell, default: str, name: str, spec: JobSpec) -> str:
    text = cell or default
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadValue(f"{name} is not valid Unicode text") from None
    if "\0" in text:
        raise BadValue(f"{name} holds a NUL character")
    if len(text) > spec.prompt.max_characters:
        raise BadValue(
            f"the {name.replace('_', ' ')} has {len(text)} characters; prompt.max_characters allows "
            f"{spec.prompt.max_characters}"
        )
    return text


def _prompt(cell: Cell, spec: JobSpec) -> str:
    prompt = _text(cell, "", "prompt", spec)
    if not prompt.strip():
        raise BadValue("the prompt is empty")
    return prompt


def _whole(cell: Cell, default: int, name: str, low: int, high: int) -> int:
    if not cell:
        return default
    try:
        value = int(cell)
    except ValueError:
        number = _float(cell)
        value = int(number) if number.is_integer() else low - 1  # 7.0 is 7: tables turn whole numbers into these
    if not low <= value <= high:
        raise BadValue(f"{name} is {cell!r}; should be a whole number from {low} to {high}")
    return value


def _number(cell: Cell, default: float, name: str) -> float:
    if not cell:
        return default
    value = _float(cell)
    if not math.isfinite(value) or value < 0:
        raise BadValue(f"{name} is {cell!r}; should be a number, 0 or more")
    return value


def _images(init: Cell, mask: Cell, model: ModelFacts) -> tuple[Cell, Cell]:
    """Where the picture to start from and its mask lie; None for a row that has none."""
    init, mask = init or None, mask or None
    if "\0" in f"{init}{mask}":
        raise BadValue("init_image or mask_image holds a NUL character")
    if mask is not None and init is None:
        raise BadValue("mask_image is given without an init_image to repaint")
    if model.repaints and mask is None:
        raise BadValue("an inpainting model needs init_image and mask_image; name their columns in input.columns")
    return init, mask


def _strength(cell: Cell, default: float, steps: int) -> float:
    value = _number(cell, default, "strength")
    if not 0 < value <= 1:
        raise BadValue(f"strength is {cell!r}; should be more than 0 and at most 1")
    if int(steps * value) < 1:
        raise BadValue(f"strength {value:g} of {steps} steps leaves no step to take; raise one of them")
    return value


def _float(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _size(cell: Cell, default: int, name: str, base: Generate) -> int:
    pixels = _whole(cell, default, name, 1, 16384)
    if base.round_size is None or pixels % SIZE_STEP == 0:
        return pixels
    if base.round_size == "nearest":
        steps = (pixels + SIZE_STEP // 2) // SIZE_STEP
    else:
        steps = pixels // SIZE_STEP + (base.round_size == "up")
    return max(steps, 1) * SIZE_STEP


def _sampler(cell: Cell, default: str) -> str:
    names = get_args(SamplerName)
    if cell and cell not in names:
        raise BadValue(f"sampler is {cell!r}; use one of {', '.join(names)}")
    return cell or default
