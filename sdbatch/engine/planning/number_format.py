"""What a model computes in: ``model.dtype: auto`` is decided when a job is planned, and from then on part of its plan;
what the machine can't do is told there, too."""

from __future__ import annotations

import os

from sdbatch.engine.models.null import NULL
from sdbatch.errors import UsageError
from sdbatch.ledger import Job
from sdbatch.spec import JobSpec


def with_format(spec: JobSpec, standing: Job | None) -> JobSpec:
    """The spec with a format in place of ``auto``: the one that stands in the plan, or what is fast where it is made.

    Left out it is float32 on the CPU and float16 on GPUs, which all of them are fast in.
    Raises UsageError where auto is for a GPU and none is to be seen.
    """
    left_out = "dtype" not in spec.model.model_fields_set and spec.resources.device == "cuda"
    if spec.model.dtype != "auto" and not left_out:
        return spec
    if standing is not None:
        return _with(spec, standing.spec["model"]["dtype"])
    if spec.model.uri == NULL:
        return _with(spec, "float32")
    if left_out:
        return _with(spec, "float16")
    import torch  # takes seconds

    from sdbatch.diffusion.processor import best_dtype

    if spec.resources.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "model.dtype: is auto, but no GPU is to be seen where the job is planned; plan it where there is one "
            "('sdbatch plan'), or write bfloat16 or float16"
        )
    return _with(spec, best_dtype(spec.resources.device))


def check_computing(spec: JobSpec) -> None:
    """Raise UsageError where the job's model, or this machine, can't do as ``model.fp8`` and ``model.compile`` say.

    What other nodes can do, or a GPU that is not to be seen here, their actors tell before they draw anything.
    """
    model, device = spec.model, spec.resources.device
    if not (model.fp8 or model.compile):
        return
    if model.uri == NULL:
        raise UsageError(f"model: {NULL} has no network: set model.fp8 and model.compile to false")
    from sdbatch.engine.models import latent_model  # torch takes seconds

    if not os.environ.get("RAY_ADDRESS") and latent_model.is_there(device):
        latent_model.check_computing(model, device)


def _with(spec: JobSpec, dtype: str) -> JobSpec:
    return spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": dtype})})
