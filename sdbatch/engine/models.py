"""The job's model, found and, where it lies in an object store, brought to this machine."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from sdbatch.diffusion import Adaptation, Checkpoint, LatentDiffusion, Lora, TextualInversion, open_checkpoint
from sdbatch.diffusion.adapters import adapt
from sdbatch.diffusion.locate import local_path
from sdbatch.diffusion.textual_inversion import read_embedding
from sdbatch.errors import ModelError, StorageError
from sdbatch.spec import Model
from sdbatch.storage import open_store


@dataclass(frozen=True)
class FoundModel:
    """A checkpoint with all that is added to it, and one checksum over everything that decides what it computes."""

    checkpoint: Checkpoint
    sha256: str


def find_model(model: Model) -> FoundModel:
    """Find the model on this machine, fetching what lies elsewhere. Raises ModelError."""
    uri, tokenizer = bring(model.uri), None if model.tokenizer is None else bring(model.tokenizer)
    added = _adaptations(model)
    checkpoint = open_checkpoint(uri, tokenizer, model.prediction_type, added, model.timestep_spacing)
    networks = {component.name: component.skeleton() for component in checkpoint.components}
    adapt(checkpoint, networks, added)  # to networks without weights: only to see that everything fits
    return FoundModel(checkpoint, _sha256(checkpoint, added))


def load_model(model: Model, device: str) -> tuple[LatentDiffusion, str]:
    """The model on ``device``, as the job wants it, and the checksum of what was loaded."""
    added = _adaptations(model)
    loaded = LatentDiffusion.from_pretrained(
        bring(model.uri),
        device,
        model.dtype,
        tokenizer=None if model.tokenizer is None else bring(model.tokenizer),
        prediction_type=model.prediction_type,
        timestep_spacing=model.timestep_spacing,
        adaptations=added,
    )
    loaded.vae_tiling, loaded.vae_slicing = model.vae_tiling, model.vae_slicing
    loaded.offload_text_encoders = model.offload_text_encoders
    return loaded, _sha256(loaded.checkpoint, added)


def located(model: Model, found: FoundModel) -> Model:
    """The model's spec for processes with other working folders: paths whole, a Hub model's revision pinned."""
    uri = model.uri
    if uri.startswith("hf:") and "@" not in uri and "snapshots" in found.checkpoint.path.parts:
        parts = found.checkpoint.path.parts
        revision = parts[len(parts) - parts[::-1].index("snapshots")]
        owner, name, *file = uri.removeprefix("hf:").split("/", 2)
        uri = "/".join([f"hf:{owner}/{name}@{revision}", *file])
    return model.model_copy(
        update={
            "uri": _whole(uri),
            "tokenizer": None if model.tokenizer is None else _whole(model.tokenizer),
            "loras": [lora.model_copy(update={"uri": _whole(lora.uri)}) for lora in model.loras],
            "embeddings": [word.model_copy(update={"uri": _whole(word.uri)}) for word in model.embeddings],
        }
    )


def _whole(uri: str) -> str:
    elsewhere = uri.startswith(("builtin:", "hf:", "s3://"))
    return uri if elsewhere else str(local_path(uri).absolute())


def _adaptations(model: Model) -> tuple[Adaptation, ...]:
    loras = [Lora(local_path(bring(lora.uri)), lora.weight) for lora in model.loras]
    words = [TextualInversion(local_path(bring(word.uri)), word.token) for word in model.embeddings]
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


def bring(uri: str) -> str:
    """A path for ``s3://``, fetched once into the user's cache; anything else as it is. Raises ModelError."""
    if not uri.startswith("s3://"):
        return uri
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdbatch/models"
    single = uri.endswith(".safetensors")
    root, _, name = uri.rpartition("/") if single else (uri, "", "")
    try:
        store = open_store(root)
        keys = [name] if single else [entry.key for entry in store.list() if _wanted(entry.key)]
        if not keys:
            raise ModelError(f"model '{uri}' does not exist, or holds nothing")
        versions = [[root, key, store.version(key)] for key in keys]
        # What lies there now has a folder of its own: files that were there once are in another.
        folder = cache / hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:32]
        for key in keys:
            kept = folder / key
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                partial = kept.with_name(f"{kept.name}.{os.getpid()}.partial")
                store.fetch(key, partial)
                partial.replace(kept)
    except StorageError as error:
        raise ModelError(f"model '{uri}': {error}") from None
    except OSError as error:
        raise ModelError(f"model '{uri}' can't be kept in {cache}: {error}") from None
    return str(folder / name if single else folder)


def _wanted(key: str) -> bool:
    return key.endswith((".json", ".txt", ".safetensors")) and ".." not in key
