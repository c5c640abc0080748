"""diffusers with the same weights, to measure ourselves against: no other file of the package imports it."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdbatch.bench.clock import Draw, Setting
from sdbatch.bench.subject import Subject
from sdbatch.diffusion.pipeline import to_uint8
from sdbatch.diffusion.weights import DTYPES
from sdbatch.errors import UsageError

#: Our samplers by the names that they have there.
_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}

#: What its documentation advises, each on top of those before.
Recipe = Callable[[Any], None]


def _eager(pipe: Any) -> None:
    pass


def _channels_last(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)


def _fused(pipe: Any) -> None:
    _channels_last(pipe)
    pipe.fuse_qkv_projections()


def _compiled(pipe: Any) -> None:
    _fused(pipe)
    pipe.unet.compile(mode="max-autotune" if pipe.device.type == "cuda" else None, fullgraph=True, dynamic=False)
    pipe.vae.decode = torch.compile(pipe.vae.decode, dynamic=False)


RECIPES: dict[str, Recipe] = {
    "eager": _eager,
    "channels last": _channels_last,
    "channels last, fused QKV": _fused,
    "channels last, fused QKV, compiled": _compiled,
}


def check_rival(sampler: str) -> None:
    """Raise UsageError unless diffusers is there and has this sampler."""
    if importlib.util.find_spec("diffusers") is None:
        raise UsageError("bench: --against diffusers needs diffusers and transformers: pip install diffusers")
    if sampler not in _SCHEDULERS:
        raise UsageError(f"bench: --against diffusers: use one of the samplers {', '.join(_SCHEDULERS)}")


@contextmanager
def saved(subject: Subject, dtype: str) -> Iterator[Path]:
    """The subject's weights in a folder that diffusers opens, for as long as it takes to load them."""
    with tempfile.TemporaryDirectory() as folder:
        subject.save_pretrained(folder, dtype)
        yield Path(folder)


def rival_draws(folder: Path, setting: Setting, recipe: str) -> Draw:
    """A diffusers pipeline with the weights in ``folder``, made as a recipe says."""
    import diffusers
    from transformers.utils import logging as of_texts

    for library in (diffusers.utils.logging, of_texts):
        library.set_verbosity_error()
        library.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind: Any = diffusers.DiffusionPipeline
        pipe = kind.from_pretrained(folder, torch_dtype=DTYPES[setting.dtype], low_cpu_mem_usage=False)
    pipe.to(setting.device)
    pipe.scheduler = getattr(diffusers, _SCHEDULERS[setting.sampler]).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    RECIPES[recipe](pipe)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        with torch.inference_mode():
            pictures = pipe(
                list(prompts),
                width=setting.width,
                height=setting.height,
                num_inference_steps=setting.steps,
                guidance_scale=setting.guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="pt",
            ).images
        return to_uint8(pictures)

    return draw
