"""Latent diffusion models as the engine uses them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from sdbatch.diffusion import (
    SAMPLERS,
    Adaptation,
    Checkpoint,
    LatentDiffusion,
    Lora,
    Reading,
    TextualInversion,
    open_checkpoint,
    to_uint8,
)
from sdbatch.diffusion.adapters import adapt
from sdbatch.diffusion.locate import local_path
from sdbatch.diffusion.memory import peak_bytes
from sdbatch.diffusion.processor import processor
from sdbatch.diffusion.samplers import most_steps
from sdbatch.diffusion.textual_inversion import read_embedding
from sdbatch.engine.image_model import FoundModel
from sdbatch.prompts import ImageRequest, ModelFacts
from sdbatch.spec import Generate, Model, Resources

#: Prompts that stay read: the job's negative prompt, and those of which several pictures are made in a row.
_KEPT_TEXTS = 256


class LatentModel:
    """A latent diffusion model on the job's device. One thread makes it and draws with it."""

    device_errors: tuple[type[Exception], ...] = (torch.OutOfMemoryError, torch.AcceleratorError)
    memory_errors: tuple[type[Exception], ...] = (torch.OutOfMemoryError,)

    def __init__(self, model: Model, settings: Generate, resources: Resources) -> None:
        """Load ``model``, all of which lies on this machine. Raises ModelError."""
        # Thread counts belong to the thread that sets them, and they can change a picture's last bits.
        torch.set_num_threads(resources.cpus_per_actor)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        added = _adaptations(model)
        self._model = LatentDiffusion.from_pretrained(
            model.uri,
            resources.device,
            model.dtype,
            tokenizer=model.tokenizer,
            prediction_type=model.prediction_type,
            timestep_spacing=model.timestep_spacing,
            adaptations=added,
        )
        self._model.vae_tiling, self._model.vae_slicing = model.vae_tiling, model.vae_slicing
        self._model.offload_text_encoders = model.offload_text_encoders
        self._model.keeps_texts = _KEPT_TEXTS
        self._settings = settings
        self._reading = Reading(settings.long_prompts, settings.emphasis, settings.clip_skip)
        self.sha256 = _sha256(self._model.checkpoint, added)
        self.mask_cell = self._model.vae.config.downscale
        on_gpu = resources.device == "cuda"
        self.environment = {
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name() if on_gpu else processor(),
            "threads": str(resources.cpus_per_actor),
        }

    def draw(
        self, requests: Sequence[ImageRequest | None], pictures: np.ndarray | None, masks: np.ndarray | None
    ) -> tuple[np.ndarray, list[bool]]:
        """See ``ImageModel``. Empty slots are drawn too, so that every batch of a shape computes the same."""
        lead, settings = next(request for request in requests if request is not None), self._settings
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
        drawn = self._model.decode(latents)
        finite: list[bool] = drawn.isfinite().flatten(1).all(dim=1).tolist()
        return to_uint8(drawn.nan_to_num()), finite

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """See ``ImageModel``: the text encoder's room counts, unless prompts are read in chunks."""
        if self._reading.long_prompts == "chunk":
            return [False] * len(prompts)
        return [length > self._model.tokenizer.room for length in self._model.lengths(prompts, self._reading)]


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


def latent_footprint(model: Model, width: int, height: int) -> Callable[[int], int]:
    """Bytes by batch, of a model that lies on this machine. Raises ModelError."""
    checkpoint = open_checkpoint(model.uri, model.tokenizer, model.prediction_type)

    def takes(batch: int) -> int:
        return peak_bytes(
            checkpoint,
            dtype=model.dtype,
            batch=batch,
            width=width,
            height=height,
            vae_tiling=model.vae_tiling,
            vae_slicing=model.vae_slicing,
            offload_text_encoders=model.offload_text_encoders,
        ).peak

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
