"""Finding models: built in, on disk, on the Hugging Face Hub."""

from __future__ import annotations

import importlib.resources
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sdbatch.diffusion.adapters import Adaptation, learn_words
from sdbatch.diffusion.checkpoint import Checkpoint
from sdbatch.diffusion.folder import ENCODERS, read_folder, weights_name
from sdbatch.diffusion.single_file import read_single_file
from sdbatch.diffusion.tokenizer import CLIPTokenizer, clip_tokenizer, read_tokenizer
from sdbatch.errors import ModelError, StoreAway

_HUB = re.compile(r"hf:(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/pr/\d+|[^/]+))?(/(?P<file>.+\.safetensors))?")
_HUB_PART = re.compile(r"hf:(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/pr/\d+|[^/]+))?(/(?P<part>[A-Za-z0-9_-]+))?")
_NETWORKS = ("unet", "vae", *ENCODERS)


def open_checkpoint(
    uri: str,
    tokenizer: str | None = None,
    prediction_type: str | None = None,
    adaptations: Sequence[Adaptation] = (),
    timestep_spacing: str | None = None,
) -> Checkpoint:
    """Find a model and understand it; weights are not read yet.

    ``uri``: ``builtin:NAME``, a folder in the diffusers layout, an original single .safetensors file, or
    ``hf:OWNER/NAME[@REVISION][/FILE]``. ``tokenizer``: a folder with vocab.json and merges.txt, for files that bring
    none. ``prediction_type`` and ``timestep_spacing`` override what the checkpoint says. The tokenizers know the
    words that ``adaptations`` bring. Raises ModelError.
    """
    path = locate(uri)
    if path.is_file():
        checkpoint = read_single_file(path, lambda: _tokenizer_for(path, tokenizer), prediction_type)
    else:
        checkpoint = read_folder(path)
        if prediction_type is not None:
            checkpoint = replace(checkpoint, schedule=replace(checkpoint.schedule, prediction_type=prediction_type))
    if timestep_spacing is not None:
        checkpoint = replace(checkpoint, schedule=replace(checkpoint.schedule, timestep_spacing=timestep_spacing))
    learn_words(checkpoint, adaptations)
    return checkpoint


def local_path(uri: str) -> Path:
    """A path on this machine, with ``~``. Raises ModelError for somebody's home that there is none of."""
    try:
        return Path(uri).expanduser()
    except RuntimeError as error:
        raise ModelError(f"'{uri}': {error}") from None


def locate(uri: str) -> Path:
    """The folder or file that a model's name stands for; models on the Hub are fetched. Raises ModelError."""
    if uri.startswith("builtin:"):
        return _built_in(uri, "model_index.json")
    if uri.startswith("hf:"):
        return _from_hub(uri)
    path = local_path(uri)
    if path.suffix in {".ckpt", ".pt", ".pth", ".bin"}:
        raise ModelError(f"model '{uri}' is a pickle, which can run code when opened; convert it to .safetensors")
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ModelError(f"model '{path.absolute()}' does not exist")
        return path
    if not (path / "model_index.json").is_file():
        raise ModelError(
            f"model '{path.absolute()}' has no model_index.json; name a folder in the diffusers layout, "
            "a .safetensors file, hf:OWNER/NAME or builtin:NAME"
        )
    return path


def locate_clip(uri: str, part: str = "") -> Path:
    """The folder of a CLIP, which has a config.json; ``part``: one within a folder in the diffusers layout, if it is
    such a folder. From the Hub, ``hf:OWNER/NAME[@REVISION][/PART]``. Raises ModelError."""
    if uri.startswith("builtin:"):
        return _built_in(uri, "config.json")
    if uri.startswith("hf:"):
        found = _HUB_PART.fullmatch(uri)
        if found is None:
            raise ModelError(f"model '{uri}' should be hf:OWNER/NAME, hf:OWNER/NAME@REVISION, and /FOLDER if one")
        folders = [f"{found['part']}/"] if found["part"] else ["", *([f"{part}/"] if part else [])]
        texts = [f"{folder}{name}" for folder in (*folders, "feature_extractor/") for name in ("*.json", "*.txt")]
        path = _fetch(found, uri, [*texts, *(f"{folder}model{end}" for folder in folders for end in _ends(""))])
        path = path / (found["part"] or "")
    else:
        path = local_path(uri)
    if part and (path / part / "config.json").is_file():
        return path / part
    if not (path / "config.json").is_file():
        raise ModelError(
            f"model '{uri if uri.startswith('hf:') else path.absolute()}' has no config.json; name a folder as "
            "transformers saves CLIP in, hf:OWNER/NAME or builtin:NAME"
        )
    return path


def _built_in(uri: str, mark: str) -> Path:
    """The built-in model of this name, of those whose folder has such a file."""
    models, name = Path(str(importlib.resources.files("sdbatch"))) / "models", uri.removeprefix("builtin:")
    known = sorted(path.parent.name for path in models.glob(f"*/{mark}"))
    if name not in known:
        raise ModelError(f"model '{uri}' is not built in; there is: " + ", ".join(f"builtin:{n}" for n in known))
    return models / name


def _from_hub(uri: str) -> Path:
    """A snapshot in the Hub's own cache, fetched if it is not there. A job on local weights never comes here."""
    found = _HUB.fullmatch(uri)
    if found is None:
        raise ModelError(f"model '{uri}' should be hf:OWNER/NAME, hf:OWNER/NAME@REVISION, and /FILE.safetensors if one")
    file = found["file"]
    if file:
        path = _fetch(found, uri, [file]) / file
    else:
        # Repositories hold much that is not read: copies of weights in other formats, and whole checkpoints.
        texts = ["model_index.json", "scheduler/*.json", *(f"{name}/config.json" for name in _NETWORKS)]
        texts += [f"{name}/*.{kind}" for name in ENCODERS.values() for kind in ("json", "txt")]
        path = _fetch(found, uri, [*texts, *_weights_of(_NETWORKS)])
        bare = [name for name in _NETWORKS if (path / name).is_dir() and not any((path / name).glob("*.safetensors"))]
        if bare:
            _fetch(found, uri, _weights_of(bare, ".fp16"))
    if not (path.is_file() if file else (path / "model_index.json").is_file()):
        raise ModelError(f"model '{uri}' has no {file or 'model_index.json'} in that repository")
    return path


def _weights_of(names: Sequence[str], variant: str = "") -> list[str]:
    """Patterns of the weight files that ``folder`` reads."""
    return [f"{name}/{weights_name(name)}{end}" for name in names for end in _ends(variant)]


def _ends(variant: str) -> tuple[str, ...]:
    """What the names of weight files end with."""
    return f"{variant}.safetensors", f"{variant}-?????-of-?????.safetensors", f".safetensors.index{variant}.json"


def _fetch(found: re.Match[str], uri: str, wanted: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download  # take long to import; a local model never comes here
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, revision = found["repo"], found["revision"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except GatedRepoError:
        told = f"its licence must be accepted at https://huggingface.co/{repo} and HF_TOKEN be set"
    except RepositoryNotFoundError:
        told = "there is no such repository, or it is private and HF_TOKEN is not set to a token that may read it"
    except RevisionNotFoundError:
        told = f"the repository has no revision '{revision}'"
    except LocalEntryNotFoundError:
        if not constants.HF_HUB_OFFLINE:
            told = "the Hub can't be reached, and the model is not whole in the cache"
            raise StoreAway(f"model '{uri}' can't be fetched from the Hugging Face Hub: {told}") from None
        told = "HF_HUB_OFFLINE is set, and the model is not whole in the cache"
    # The library's HTTP client has changed twice, and the errors of each come through as they are.
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
    raise ModelError(f"model '{uri}' can't be fetched from the Hugging Face Hub: {told}")


def _tokenizer_for(path: Path, tokenizer: str | None) -> CLIPTokenizer:
    if tokenizer is not None:
        folder = local_path(tokenizer)
        return read_tokenizer(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder)
    installed = importlib.util.find_spec("open_clip")
    if installed is not None and installed.origin is not None:
        merges = Path(installed.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
        if merges.is_file():
            return clip_tokenizer(merges)
    raise ModelError(
        f"model file {path} brings no tokenizer: set model.tokenizer to a folder with CLIP's vocab.json and merges.txt "
        "(the tokenizer/ of any Stable Diffusion folder), or install the package open_clip_torch"
    )
