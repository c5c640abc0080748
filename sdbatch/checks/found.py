"""The models of a job's checks: found, told by their checksums, and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdbatch.checks.measures import Measures
from sdbatch.errors import ModelError
from sdbatch.spec import Checks

if TYPE_CHECKING:
    from sdbatch.diffusion.checkpoint import Component
    from sdbatch.diffusion.clip_folder import ClipFolder


@dataclass(frozen=True)
class FoundChecks:
    """The models of checks, by the checks' names: their checksums, and where they lie on this machine."""

    sha256: dict[str, str]
    paths: dict[str, Path]


def find_checks(checks: Checks | None) -> FoundChecks:
    """Understand the checks' models, which lie on this machine, without loading them. Raises ModelError."""
    found = FoundChecks({}, {})
    for name in _with_models(checks):
        folder, component = _stored(checks, name)
        with _naming(name):
            component.skeleton()
        found.sha256[name], found.paths[name] = folder.fingerprint(), folder.path
    return found


def load_measures(checks: Checks, device: str, threads: int, *, emphasis: bool) -> Measures:
    """What measures pictures, with models on ``device``, in the thread that calls this. Raises ModelError.

    ``emphasis``: prompts have weights in brackets.
    """
    if not _with_models(checks):
        return Measures(checks)
    import torch  # takes seconds to import

    from sdbatch.checks.clip_score import Scorer
    from sdbatch.checks.safety import Classifier, Concepts

    torch.set_num_threads(threads)
    stored = {name: _stored(checks, name) for name in _with_models(checks)}
    models = {name: component.load(device, torch.float32) for name, (_, component) in stored.items()}
    scorer = Scorer(models["clip_score"], emphasis) if "clip_score" in models else None
    classifier = None
    if checks.safety is not None:
        model, concepts = models["safety"], checks.safety.concepts
        classifier = Classifier(Concepts(model, concepts) if concepts else model)
    return Measures(checks, scorer, classifier, {name: folder.fingerprint() for name, (folder, _) in stored.items()})


def measures_bytes(checks: Checks | None) -> Callable[[int], int]:
    """What the checks' models take of the device for a batch of so many pictures. Raises ModelError."""
    components = [_stored(checks, name)[1] for name in _with_models(checks)]

    def takes(batch: int) -> int:
        from sdbatch.diffusion.memory import image_encoder_bytes

        return sum(image_encoder_bytes(component, batch) for component in components)

    return takes


def _with_models(checks: Checks | None) -> list[str]:
    return [] if checks is None else list(checks.models)


def _stored(checks: Checks | None, name: str) -> tuple[ClipFolder, Component]:
    """A check's model as it lies on the disk. Raises ModelError where it is none, or of the wrong kind."""
    from sdbatch.diffusion.clip import clip_component  # torch, as above
    from sdbatch.diffusion.clip_folder import read_clip_folder
    from sdbatch.diffusion.locate import locate_clip
    from sdbatch.diffusion.safety_checker import CONCEPTS, safety_component

    with _naming(name):
        if checks is not None and checks.safety is not None and name == "safety":
            folder = read_clip_folder(locate_clip(checks.safety.model, "safety_checker"))
            if CONCEPTS not in folder.weights.shapes:
                if not checks.safety.concepts:
                    raise ModelError(f"{folder.path} is no safety checker; for a CLIP name checks.safety.concepts")
                return folder, clip_component(folder)
            if checks.safety.concepts:
                raise ModelError(f"{folder.path} has concepts of its own; leave checks.safety.concepts out")
            return folder, safety_component(folder)
        uri = "" if checks is None or checks.clip_score is None else checks.clip_score.model
        folder = read_clip_folder(locate_clip(uri))
        if CONCEPTS in folder.weights.shapes:
            raise ModelError(f"{folder.path} is a safety checker, which reads no prompts; name a CLIP")
        return folder, clip_component(folder)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors tell the field."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"checks.{name}.model: {error}") from None
