"""What people add to a checkpoint: LoRAs and textual inversions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sdbatch.diffusion.checkpoint import Checkpoint
from sdbatch.diffusion.families import UNET
from sdbatch.diffusion.lora import merge_lora
from sdbatch.diffusion.original_names import unet_origins
from sdbatch.diffusion.textual_inversion import append_vectors, read_embedding
from sdbatch.errors import ModelError


@dataclass(frozen=True)
class Lora:
    """A LoRA file, added ``weight`` times."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class TextualInversion:
    """A file of learnt vectors that ``token`` stands for in prompts; None: what the file calls it."""

    path: Path
    token: str | None = None


Adaptation = Lora | TextualInversion


def learn_words(checkpoint: Checkpoint, adaptations: Sequence[Adaptation]) -> None:
    """Let the tokenizers know the words of textual inversions, in the places where ``adapt`` puts their vectors."""
    rows = {encoder.name: encoder.config.vocab_size for encoder in checkpoint.text_encoders}
    tokenizers = dict(zip(rows, checkpoint.tokenizers, strict=True))
    for adaptation in adaptations:
        if isinstance(adaptation, TextualInversion):
            embedding = read_embedding(adaptation.path)
            if embedding.vectors.keys() - rows.keys():
                raise ModelError(f"embedding {adaptation.path} is for two text encoders; {checkpoint.family} has not")
            for name, vectors in embedding.vectors.items():
                ids = range(rows[name], rows[name] + len(vectors))
                tokenizers[name].add_word(adaptation.token or embedding.token, ids)
                rows[name] += len(vectors)


def adapt(checkpoint: Checkpoint, networks: Mapping[str, nn.Module], adaptations: Sequence[Adaptation]) -> None:
    """Apply each to ``networks`` ("unet", "text_encoder", …). Raises ModelError where one does not fit the model."""
    for adaptation in adaptations:
        if isinstance(adaptation, Lora):
            merge_lora(networks, adaptation.path, adaptation.weight, _original_names(checkpoint))
        else:
            for name, vectors in read_embedding(adaptation.path).vectors.items():
                append_vectors(networks[name], vectors)


def _original_names(checkpoint: Checkpoint) -> dict[str, str]:
    """The U-Net's layers as the original code calls them → as we do."""
    return {
        origin.key.removeprefix(UNET).rpartition(".")[0]: key.rpartition(".")[0]
        for key, origin in unet_origins(checkpoint.unet.config).items()
    }
