"""How many pictures at once: decided when a job is planned, and from then on part of its plan."""

from __future__ import annotations

from sdbatch.engine.machine import memory_bytes
from sdbatch.engine.models.loading import Footprint, footprint
from sdbatch.errors import UsageError
from sdbatch.ledger import Job
from sdbatch.prompts import ModelFacts
from sdbatch.spec import JobSpec, Resources

#: Pixels in a batch beyond which pictures a second hardly grow. CPU: measured, docs/performance.md has the curve. GPU:
#: not measured yet; sixteen pictures of 512x512, or four of 1024x1024.
_ENOUGH = {"cpu": 8 * 64 * 64, "cuda": 16 * 512 * 512}


def decided(spec: JobSpec, facts: ModelFacts, standing: Job | None) -> JobSpec:
    """The spec with a number in place of ``resources.batch_size: auto``: the one that stands in the plan, if any.

    Raises UsageError where no number can be found out, or a given one does not fit the GPU that is seen here.
    """
    resources = spec.resources
    auto = resources.batch_size == "auto"
    if standing is not None:
        return _with(spec, standing.spec["resources"]["batch_size"]) if auto else spec
    if not auto and resources.device == "cpu":
        return spec
    limit = device_bytes(resources)
    if limit is None and auto:
        raise UsageError(
            "resources.batch_size: is auto, but no GPU is to be seen where the job is planned; plan it where there is "
            "one ('sdbatch plan'), or write a number"
        )
    if limit is None:
        return spec  # actors will tell
    width, height = spec.generate.width or facts.default_size[0], spec.generate.height or facts.default_size[1]
    takes = footprint(spec, width, height)
    if auto:
        return _with(spec, _chosen(takes, limit, max(_ENOUGH[resources.device] // (width * height), 1)))
    if takes(resources.at_once) > limit:
        raise UsageError(too_large(resources.at_once, width, height, takes, limit))
    return spec


def device_bytes(resources: Resources) -> int | None:
    """What an actor's tensors can take of the memory here; None for a GPU job where no GPU is to be seen."""
    if resources.device == "cpu":
        whole: float = memory_bytes() / resources.fewest
    else:
        import torch  # takes seconds

        if not torch.cuda.is_available():
            return None
        whole = torch.cuda.get_device_properties(0).total_memory * min(resources.gpus_per_actor, 1.0)
    return int(whole * _USABLE)


#: The rest is for what is no tensor: the driver, libraries' workspaces, what allocators round up.
_USABLE = 0.85


def too_large(batch: int, width: int, height: int, takes: Footprint, limit: int) -> str:
    """That a batch does not fit, and how many pictures do."""
    most = _most(takes, limit, batch)
    told = f"resources.batch_size: {batch} pictures of {width}x{height} at once do not fit the device's memory"
    return f"{told}; at most {most} do" if most else f"{told}, nor does a single one; make smaller pictures"


def _chosen(takes: Footprint, limit: int, enough: int) -> int:
    """The largest power of two that is useful and fits; at least one."""
    batch = 1 << (enough.bit_length() - 1)
    while batch > 1 and takes(batch) > limit:
        batch //= 2
    return batch


def _most(takes: Footprint, limit: int, beyond: int) -> int:
    """The largest batch that fits, where ``beyond`` did not. Memory grows evenly with the batch, or faster."""
    one, all_ = takes(1), takes(beyond)
    if all_ <= limit:  # something else is on the device, or the memory model is wrong
        return beyond // 2
    return 1 + (limit - one) * (beyond - 1) // (all_ - one) if one <= limit else 0


def _with(spec: JobSpec, batch: int) -> JobSpec:
    return spec.model_copy(update={"resources": spec.resources.model_copy(update={"batch_size": batch})})
