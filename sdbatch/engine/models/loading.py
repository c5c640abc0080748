"""The job's models, found and, where they lie in an object store, brought to this machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sdbatch.checks import FoundChecks, Measures, find_checks, load_measures, measures_bytes
from sdbatch.engine.models.compiled import CompiledCode
from sdbatch.engine.models.image_model import FoundModel, ImageModel
from sdbatch.engine.models.null import NULL, NullModel, find_null
from sdbatch.engine.models.turns import Desk
from sdbatch.errors import ModelError, told_of
from sdbatch.spec import Checks, JobSpec, Model
from sdbatch.storage import open_store


def find_model(model: Model) -> FoundModel:
    """Find the model on this machine, fetching what lies elsewhere. Raises ModelError."""
    if model.uri == NULL:
        return find_null()
    from sdbatch.engine.models.latent_model import find_latent  # torch takes seconds to import

    return find_latent(_with_uris(model, bring))


def load_model(spec: JobSpec, desk: Desk) -> ImageModel:
    """The job's model, ready to draw in the thread that calls this; ``desk`` gives turns to compile.

    Raises ModelError.
    """
    if spec.model.uri == NULL:
        return NullModel()
    from sdbatch.engine.models.latent_model import LatentModel  # as above

    code = partial(CompiledCode, open_store(spec.output.uri), desk) if spec.model.compile else None
    return LatentModel(_with_uris(spec.model, bring), spec.generate, spec.resources, code)


#: Bytes that a batch of so many pictures takes of the device, weights and all.
Footprint = Callable[[int], int]


def footprint(spec: JobSpec, width: int, height: int) -> Footprint:
    """What the job's models take for pictures of a size, told without loading them. Raises ModelError."""
    checks = checks_footprint(spec)
    if spec.model.uri == NULL:
        return checks
    from sdbatch.engine.models.latent_model import latent_footprint  # as above

    on_gpu = spec.resources.device == "cuda"
    drawing = latent_footprint(_with_uris(spec.model, bring), width, height, on_gpu=on_gpu)
    return lambda batch: drawing(batch) + checks(batch)


def checks_footprint(spec: JobSpec) -> Footprint:
    """What the models of the job's checks take of that. Raises ModelError."""
    return measures_bytes(_brought(spec.checks))


def find_job_checks(spec: JobSpec) -> FoundChecks:
    """Find the models of the job's checks on this machine, fetching what lies elsewhere. Raises ModelError."""
    return find_checks(_brought(spec.checks))


def load_job_measures(spec: JobSpec) -> Measures | None:
    """What measures the job's pictures, in the thread that calls this; None without checks. Raises ModelError."""
    checks = _brought(spec.checks)
    if checks is None:
        return None
    resources = spec.resources
    return load_measures(checks, resources.device, resources.cpus_per_actor, emphasis=spec.generate.emphasis)


def located(model: Model, found: FoundModel) -> Model:
    """The model's spec for processes with other working folders: paths whole, a Hub model's revision pinned."""
    if found.path is not None:
        model = model.model_copy(update={"uri": _pinned(model.uri, found.path)})
    return _with_uris(model, _whole)


def located_checks(checks: Checks | None, found: FoundChecks) -> Checks | None:
    """The spec's checks for processes with other working folders, as :func:`located`."""
    return _checks_with_uris(checks, lambda uri, name: _whole(_pinned(uri, found.paths[name])))


def _pinned(uri: str, path: Path) -> str:
    """The URI with the revision that was found, if it is one of the Hub's without."""
    if not uri.startswith("hf:") or "@" in uri or "snapshots" not in path.parts:
        return uri
    revision = path.parts[len(path.parts) - path.parts[::-1].index("snapshots")]
    owner, name, *file = uri.removeprefix("hf:").split("/", 2)
    return "/".join([f"hf:{owner}/{name}@{revision}", *file])


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


def _checks_with_uris(checks: Checks | None, change: Callable[[str, str], str]) -> Checks | None:
    """The spec's checks with ``change(uri, check)`` made to where their models lie."""
    if checks is None:
        return None
    return checks.model_copy(
        update={
            name: getattr(checks, name).model_copy(update={"model": change(uri, name)})
            for name, uri in checks.models.items()
        }
    )


def _brought(checks: Checks | None) -> Checks | None:
    """The spec's checks with their models on this machine. Raises ModelError, which names the field."""

    def change(uri: str, name: str) -> str:
        try:
            return bring(uri)
        except ModelError as error:
            raise ModelError(f"checks.{name}.model: {error}") from None

    return _checks_with_uris(checks, change)


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
    with told_of(f"model '{uri}'", ModelError):
        store = open_store(root)
        keys = [name] if single else [entry.key for entry in store.list() if _wanted(entry.key)]
        if not keys:
            raise ModelError(f"model '{uri}' does not exist, or holds nothing")
        versions = [[root, key, store.version(key)] for key in keys]
        # What lies there now has a folder of its own: files that were there once are in another.
        folder = cache / hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:32]
        try:
            for key in keys:
                kept = folder / key
                if not kept.exists():
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    partial = kept.with_name(f"{kept.name}.{os.getpid()}.partial")
                    store.fetch(key, partial)
                    partial.replace(kept)
        except OSError as error:
            raise ModelError(f"model '{uri}' can't be kept in {cache}: {error}") from None
    return str(folder / name if single else folder)


def _wanted(key: str) -> bool:
    return key.endswith((".json", ".txt", ".safetensors")) and ".." not in key
