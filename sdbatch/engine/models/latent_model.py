"""Latent diffusion models as the engine uses them."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from sdbatch import __version__
from sdbatch.diffusion import (
    SAMPLERS,
    Adaptation,
    Checkpoint,
    LatentDiffusion,
    Lora,
    Reading,
    TextualInversion,
    open_checkpoint,
)
from sdbatch.diffusion.adapters import adapt
from sdbatch.diffusion.compilation import compile_blocks, compile_into
from sdbatch.diffusion.compilation import lacking as compiler_lacking
from sdbatch.diffusion.decoding import Decoder
from sdbatch.diffusion.float8 import lacking as float8_lacking
from sdbatch.diffusion.float8 import transformers_to_float8
from sdbatch.diffusion.locate import local_path
from sdbatch.diffusion.memory import peak_bytes
from sdbatch.diffusion.processor import compute_alike, processor
from sdbatch.diffusion.samplers import most_steps
from sdbatch.diffusion.textual_inversion import read_embedding
from sdbatch.engine.models.compiled import CompiledCode, code_key
from sdbatch.engine.models.image_model import Drawn, DrawnAtOnce, FoundModel
from sdbatch.errors import JobFailed, ModelError
from sdbatch.prompts import ImageRequest, ModelFacts
from sdbatch.spec import Generate, Model, Resources

#: Characters of what the compiler says, at most.
_MOST_TOLD = 300
#: Prompts that stay read: the job's negative prompt, and those of which several pictures are made in a row.
_KEPT_TEXTS = 256


#: How errors of the libraries on a GPU begin, or what they contain; torch has no type of their own for them.
_LIBRARIES = re.compile(r"CUBLAS_STATUS|CUDNN_STATUS|cuDNN error|CUDA error|Triton Error")


class DeviceFailed(RuntimeError):
    """What a library on the device said, which no request is to blame for."""


class LatentModel:
    """A latent diffusion model on the job's device. One thread makes it and draws with it."""

    device_errors: tuple[type[Exception], ...] = (torch.OutOfMemoryError, torch.AcceleratorError, DeviceFailed)
    memory_errors: tuple[type[Exception], ...] = (torch.OutOfMemoryError,)

    def __init__(
        self,
        model: Model,
        settings: Generate,
        resources: Resources,
        code: Callable[[str], CompiledCode] | None = None,
    ) -> None:
        """Load ``model``, all of which lies on this machine; ``code`` finds what was compiled for it by a key.

        Raises ModelError.
        """
        compute_alike(resources.cpus_per_actor)
        check_computing(model, resources.device)
        added = _adaptations(model)
        checkpoint = open_checkpoint(model.uri, model.tokenizer, model.prediction_type, added, model.timestep_spacing)
        with ThreadPoolExecutor(1) as beside:  # gigabytes of weights are read once, for both
            sha256 = beside.submit(_sha256, checkpoint, added)
            self._model = LatentDiffusion.from_pretrained(
                model.uri,
                resources.device,
                model.dtype,
                tokenizer=model.tokenizer,
                prediction_type=model.prediction_type,
                timestep_spacing=model.timestep_spacing,
                adaptations=added,
            )
            self.sha256 = sha256.result()
        self._model.vae_tiling, self._model.vae_slicing = model.vae_tiling, model.vae_slicing
        self._model.texts.offloaded = model.offload_text_encoders
        self._model.texts.keeps = _KEPT_TEXTS
        self._settings = settings
        self._reading = Reading(settings.long_prompts, settings.emphasis, settings.clip_skip)
        self.mask_cell = self._model.vae.config.downscale
        on_gpu = resources.device == "cuda"
        self.environment = {
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name() if on_gpu else processor(),
            "threads": str(resources.cpus_per_actor),
        }
        self._decode = Decoder(self._model)
        self._before: Drawn = DrawnAtOnce(np.empty(0), [])
        self._shapes = set[torch.Size]()
        if model.fp8:
            transformers_to_float8(self._model.unet)
        self._code = None if code is None else code(self._key(model, resources))
        if self._code is not None:
            compile_into(self._code.folder, resources.cpus_per_actor)
            compile_blocks(self._model)

    def _key(self, model: Model, resources: Resources) -> str:
        how = model.computing, model.vae_tiling, model.vae_slicing, resources.at_once
        python = platform.python_version()
        return code_key(self.sha256, *how, self._settings.guidance_interval, self.environment, python, __version__)

    def draw(
        self, requests: Sequence[ImageRequest | None], pictures: np.ndarray | None, masks: np.ndarray | None
    ) -> Drawn:
        """See ``ImageModel``. Empty slots are drawn too, so that every batch of a shape computes the same."""
        try:
            return self._drawn_with_code(requests, pictures, masks)
        except RuntimeError as error:
            if _LIBRARIES.search(str(error)) and not isinstance(error, self.device_errors):
                raise DeviceFailed(str(error)) from error
            raise

    def _drawn_with_code(
        self, requests: Sequence[ImageRequest | None], pictures: np.ndarray | None, masks: np.ndarray | None
    ) -> Drawn:
        lead = next(request for request in requests if request is not None)
        if self._code is None:
            return self._drawn(lead, requests, pictures, masks)
        shape = lead.width, lead.height, lead.guidance_scale > 1, lead.chunks
        try:
            with self._code.ready(str(shape)):
                return self._drawn(lead, requests, pictures, masks)
        except torch._dynamo.exc.TorchDynamoException as error:
            told = " ".join(str(error).split())[:_MOST_TOLD]
            raise JobFailed(f"model.compile: the compiler failed: {told}; set model.compile to false") from None

    def _drawn(
        self,
        lead: ImageRequest,
        requests: Sequence[ImageRequest | None],
        pictures: np.ndarray | None,
        masks: np.ndarray | None,
    ) -> Drawn:
        settings = self._settings
        latents = self._model.generate(
            ["" if request is None else request.prompt for request in requests],
            ["" if request is None else request.negative_prompt for request in requests],
            seeds=[0 if request is None else request.seed for request in requests],
            width=lead.width,
            height=lead.height,
            num_inference_steps=lead.num_inference_steps,
            guidance_scale=[lead.guidance_scale if request is None else request.guidance_scale for request in requests],
            sampler=lead.sampler,
            eta=settings.eta,
            guidance_rescale=settings.guidance_rescale,
            guidance_interval=settings.guidance_interval,
            reading=self._reading,
            chunks=lead.chunks,
            init_images=pictures,
            mask_images=masks,
            strength=1.0 if lead.strength is None else lead.strength,
            output="latent",
        )
        drawn, shape = self._decode(latents), latents.shape
        # One batch may be ahead of the device, no more: else nobody could tell what it is at. A shape's first is not:
        # it may have to warm up, or be compiled.
        (drawn if shape not in self._shapes else self._before).wait()
        self._shapes.add(shape)
        self._before = drawn
        return drawn

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """See ``ImageModel``: the text encoder's room counts, unless prompts are read in chunks."""
        if self._reading.long_prompts == "chunk":
            return [False] * len(prompts)
        return [length > self._model.tokenizer.room for length in self._model.lengths(prompts, self._reading)]


def is_there(device: str) -> bool:
    """Can this process see such a device, cpu or cuda?"""
    return device == "cpu" or torch.cuda.is_available()


def check_computing(model: Model, device: str) -> None:
    """Raise ModelError where this machine can't do what ``model.fp8`` or ``model.compile`` asks for."""
    for field, wanted, reason in (
        ("fp8", model.fp8, float8_lacking(device) if model.fp8 else None),
        ("compile", model.compile, compiler_lacking(device) if model.compile else None),
    ):
        if wanted and reason is not None:
            raise ModelError(f"model.{field}: {reason} on {platform.node()}; set model.{field} to false")


def find_latent(model: Model) -> FoundModel:
    """Understand a model that lies on this machine, without loading it. Raises ModelError."""
    added = _adaptations(model)
    checkpoint = open_checkpoint(model.uri, model.tokenizer, model.prediction_type, added, model.timestep_spacing)
    networks = {component.name: component.skeleton() for component in checkpoint.components}
    adapt(checkpoint, networks, added)  # to networks without weights: only to see that everything fits
    facts = ModelFacts(
        checkpoint.default_size,
        repaints=checkpoint.unet.config.in_channels == 9,
        most_steps={name: most_steps(name, checkpoint.schedule) for name in SAMPLERS},
    )
    layers = min(encoder.config.num_hidden_layers for encoder in checkpoint.text_encoders)
    return FoundModel(_sha256(checkpoint, added), facts, layers - 1, checkpoint.path, checkpoint.tokenizers)


def latent_footprint(model: Model, width: int, height: int, *, on_gpu: bool) -> Callable[[int], int]:
    """Bytes by batch, of a model that lies on this machine. Raises ModelError."""
    checkpoint = open_checkpoint(model.uri, model.tokenizer, model.prediction_type)

    def takes(batch: int) -> int:
        memory = peak_bytes(
            checkpoint,
            dtype=model.dtype,
            batch=batch,
            width=width,
            height=height,
            vae_tiling=model.vae_tiling,
            vae_slicing=model.vae_slicing,
            offload_text_encoders=model.offload_text_encoders,
            on_gpu=on_gpu,
        )
        return memory.beside if on_gpu else memory.peak

    return takes


def _adaptations(model: Model) -> tuple[Adaptation, ...]:
    loras = [Lora(local_path(lora.uri), lora.weight) for lora in model.loras]
    words = [TextualInversion(local_path(word.uri), word.token) for word in model.embeddings]
    return (*loras, *words)


def _sha256(checkpoint: Checkpoint, added: tuple[Adaptation, ...]) -> str:
    if not added:
        return checkpoint.fingerprint()
    digest = hashlib.sha256(checkpoint.fingerprint().encode())
    for adaptation in added:
        with adaptation.path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        if isinstance(adaptation, TextualInversion):
            digest.update((adaptation.token or read_embedding(adaptation.path).token).encode())
    return digest.hexdigest()
