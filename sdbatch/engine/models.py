"""The job's model, found and, where it lies in an object store, brought to this machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sdbatch.engine.compiled import CompiledCode, Desk
from sdbatch.engine.image_model import FoundModel, ImageModel
from sdbatch.engine.null import NULL, NullModel, find_null
from sdbatch.errors import ModelError, StorageError
from sdbatch.spec import JobSpec, Model
from sdbatch.storage import open_store


def find_model(model: Model) -> FoundModel:
    """Find the model on this machine, fetching what lies elsewhere. Raises ModelError."""
    if model.uri == NULL:
        return find_null()
    from sdbatch.engine.latent_model import find_latent  # torch takes seconds to import

    return find_latent(_with_uris(model, bring))


def load_model(spec: JobSpec, desk: Desk) -> ImageModel:
    """The job's model, ready to draw in the thread that calls this; ``desk`` gives turns to compile.

    Raises ModelError.
    """
    if spec.model.uri == NULL:
        return NullModel()
    from sdbatch.engine.latent_model import LatentModel  # as above

    code = partial(CompiledCode, open_store(spec.output.uri), desk) if spec.model.compile else None
    return LatentModel(_with_uris(spec.model, bring), spec.generate, spec.resources, code)


#: Bytes that a batch of so many pictures takes of the device, weights and all.
Footprint = Callable[[int], int]


def footprint(spec: JobSpec, width: int, height: int) -> Footprint:
    """What the job's model takes for pictures of a size, told without loading it. Raises ModelError."""
    if spec.model.uri == NULL:
        return lambda batch: 0
    from sdbatch.engine.latent_model import latent_footprint  # as above

    return latent_footprint(_with_uris(spec.model, bring), width, height)


def located(model: Model, found: FoundModel) -> Model:
    """The model's spec for processes with other working folders: paths whole, a Hub model's revision pinned."""
    parts = found.path.parts if found.path is not None else ()
    if model.uri.startswith("hf:") and "@" not in model.uri and "snapshots" in parts:
        revision = parts[len(parts) - parts[::-1].index("snapshots")]
        owner, name, *file = model.uri.removeprefix("hf:").split("/", 2)
        model = model.model_copy(update={"uri": "/".join([f"hf:{owner}/{name}@{revision}", *file])})
    return _with_uris(model, _whole)


def _with_uris(model: Model, change: Callable[[str], str]) -> Model:
    """The model's spec with ``change`` made to everything that it says of where things lie."""
    return model.model_copy(
        update={
            "uri": change(model.uri),
            "tokenizer": None if model.tokenizer is None else change(model.tokenizer),
            "loras": [lora.model_copy(update={"uri": change(lora.uri)}) for lora in model.loras],
            "embeddings": [word.model_copy(update={"uri": change(word.uri)}) for word in model.embeddings],
        }
    )


def _whole(uri: str) -> str:
    if uri.startswith(("builtin:", "hf:", "s3://")):
        return uri
    from sdbatch.diffusion.locate import local_path  # as above

    return str(local_path(uri).absolute())


def bring(uri: str) -> str:
    """A path for ``s3://``, fetched once into the user's cache; anything else as it is. Raises ModelError, also for
    ``builtin:null``, of which there is nothing to bring."""
    if uri == NULL:
        raise ModelError(f"model '{uri}' has no network: it serves to measure jobs, and there is nothing else to it")
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
