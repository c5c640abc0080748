"""Is everything there that a job needs? Each check tries the thing itself, and says what to do where it fails."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from sdbatch import __version__
from sdbatch.engine.cluster import ray_session, too_small
from sdbatch.engine.machine import cpus
from sdbatch.engine.models.loading import bring, find_job_checks, find_model, footprint
from sdbatch.engine.models.null import NULL
from sdbatch.engine.planning.batching import device_bytes
from sdbatch.engine.planning.reading import check_columns
from sdbatch.errors import SdbatchError, StorageError
from sdbatch.prompts import find_table
from sdbatch.spec import JobSpec, Resources
from sdbatch.storage import LocalStore, open_store

_FINE, _ODD, _BAD = "fine", "odd", "bad"
#: Open files below which Ray warns, and free bytes of a disk below which jobs soon fail.
_FEWEST_FILES, _LEAST_DISK = 4096, 2 << 30
#: Seconds that clocks may differ; S3 refuses requests from 15 minutes on.
_ODD_SKEW, _BAD_SKEW = 10.0, 300.0


@dataclass(frozen=True)
class Finding:
    """``state``: fine, odd (a job may run, but look at it) or bad (it will not)."""

    check: str
    state: str
    told: str
    remedy: str = ""


def examine(spec: JobSpec | None) -> Iterator[Finding]:
    """Everything about this machine, then about the job, if there is one."""
    yield _fine("versions", _versions())
    yield _open_files()
    yield _disk("temporary files", Path(tempfile.gettempdir()))
    yield from _guarded("gpu", lambda: _gpu(spec), "resources.gpus_per_actor: 0 draws on the CPU")
    yield from _guarded("ray", lambda: _ray(spec), "start it, or unset RAY_ADDRESS to use this machine alone")
    if spec is None:
        return
    job = spec
    yield from _guarded("model", lambda: _model(job), "sdbatch inspect tells more of a model")
    yield from _guarded("memory", lambda: _memory(job), "the model comes first")
    yield from _guarded("input", lambda: _input(job), "check input.uri and input.columns")
    yield from _guarded("output", lambda: _rights(job), "check output.uri, and the rights of your credentials")


def _guarded(check: str, look: Callable[[], list[Finding]], remedy: str) -> Iterator[Finding]:
    try:
        yield from look()
    except SdbatchError as error:
        yield Finding(check, _BAD, str(error), remedy)


def _fine(check: str, told: str) -> Finding:
    return Finding(check, _FINE, told)


def _versions() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "pyarrow", "pillow"))
    return f"sdbatch {__version__}, Python {platform.python_version()}, {packages}"


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= _FEWEST_FILES:
        return _fine("open files", f"{soft:,} allowed")
    return Finding("open files", _ODD, f"{soft:,} allowed of {hard:,}", "ulimit -n 65536, before Ray is started")


def _disk(check: str, folder: Path) -> Finding:
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    told = f"{usage.free / 1e9:,.1f} GB free at {folder}"
    if usage.free < _LEAST_DISK:
        return Finding(check, _BAD, told, "free some space, or set TMPDIR to a larger disk")
    if usage.free < usage.total / 20:
        return Finding(check, _ODD, told, "Ray warns, and spills no more, from 95 % full on")
    return _fine(check, told)


def _gpu(spec: JobSpec | None) -> list[Finding]:
    import torch  # takes seconds to import

    wanted = spec is not None and spec.resources.gpus_per_actor > 0
    built = torch.version.cuda
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return [_fine("gpu", f"{', '.join(names)}; CUDA {built}")]
    if not wanted:
        return [_fine("gpu", "none here, and none asked for")]
    why = f"torch is built for CUDA {built} and finds no device" if built else "torch is built without CUDA"
    if os.environ.get("RAY_ADDRESS"):
        return [Finding("gpu", _ODD, f"none here: {why}", "what counts are the cluster's: see ray")]
    remedy = "see what nvidia-smi says of the driver" if built else "install a torch with CUDA"
    return [Finding("gpu", _BAD, f"none here: {why}", f"{remedy}, or set resources.gpus_per_actor to 0")]


def _ray(spec: JobSpec | None) -> list[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    resources = spec.resources if spec is not None else Resources()
    if not address:
        here, asked = cpus(), resources.fewest * resources.cpus_per_actor
        told = f"would be started here, with {here} CPUs"
        if asked > here:
            return [Finding("ray", _ODD, f"{told}; actors ask for {asked}", "they will share: lower resources.actors")]
        return [_fine("ray", told)]
    import ray

    with ray_session(resources):
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        total = {kind: sum(node["Resources"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
        told = f"{address}: {len(nodes)} nodes, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs"
        if spec is not None:
            if lacking := too_small(resources):
                remedy = "a cluster that scales will get one; else change the job"
                return [Finding("ray", _ODD, f"{told}: {lacking}", remedy)]
            room = min(
                total["CPU"] // resources.cpus_per_actor,
                total["GPU"] // resources.gpus_per_actor if resources.gpus_per_actor else float("inf"),
            )
            if room < resources.fewest:
                remedy = "they come as nodes do, if it has an autoscaler; else lower resources.actors"
                return [Finding("ray", _ODD, f"{told}: room for {room:g} of {resources.fewest} actors", remedy)]
    return [_fine("ray", told)]


def _model(spec: JobSpec) -> list[Finding]:
    found = [("model", spec.model.uri, find_model(spec.model).sha256)]
    for name, sha256 in find_job_checks(spec).sha256.items():
        found.append((f"checks.{name}.model", spec.checks.models[name] if spec.checks else "", sha256))
    return [_fine(what, f"{uri}, sha256 {sha256[:12]}…") for what, uri, sha256 in found]


def _memory(spec: JobSpec) -> list[Finding]:
    if spec.model.uri == NULL:
        return [_fine("memory", "no network, none needed")]
    from sdbatch.diffusion import open_checkpoint  # torch takes seconds

    model, size = spec.model, spec.resources.batch_size
    if model.dtype == "auto":
        model = model.model_copy(update={"dtype": "float32"})  # auto takes no more
    tokenizer = None if model.tokenizer is None else bring(model.tokenizer)
    width, height = open_checkpoint(bring(model.uri), tokenizer, model.prediction_type).default_size
    batch = size if isinstance(size, int) else 1  # auto takes what there is room for
    takes = footprint(
        spec.model_copy(update={"model": model}), spec.generate.width or width, spec.generate.height or height
    )
    told = f"an actor takes {takes(batch) / 1e9:,.2f} GB at batches of {batch}"
    if os.environ.get("RAY_ADDRESS"):
        return [_fine("memory", told)]
    limit = device_bytes(spec.resources)
    if limit is None:
        return [Finding("memory", _ODD, told, "compare it with the cluster's GPUs: there is none here")]
    told += f", of {limit / 1e9:,.2f} GB that it may take"
    if takes(batch) > limit:
        return [Finding("memory", _BAD, told, "lower resources.batch_size or actors, or set model.dtype to float16")]
    return [_fine("memory", told)]


def _input(spec: JobSpec) -> list[Finding]:
    table = find_table(spec.input)
    check_columns(spec, table)
    size = sum(file.bytes for file in table.files)
    return [_fine("input", f"{len(table.files)} {table.format} file(s), {size:,} bytes")]


def _rights(spec: JobSpec) -> list[Finding]:
    """Write, read, list and remove a small object, and be refused when it is written a second time."""
    store = open_store(spec.output.uri)
    key, first = f"_sdbatch/probe-{uuid.uuid4().hex}", b"may this be written?\n"
    before = time.time()
    try:
        written = store.put_if_absent(key, first)
        clock, after = store.clock(key), time.time()
        again = store.put_if_absent(key, b"and may another write it, too?\n")
        read = store.get(key) == first
        listed = [entry.key for entry in store.list(key)] == [key]
    finally:
        store.delete(key)
    if store.exists(key):
        raise StorageError(f"{store.uri}: what was removed is still there")
    found = [_fine("output", f"{store.uri}: written, read, listed and removed")]
    if not (written and read and listed):
        raise StorageError(f"{store.uri} does not give back what was written")
    if again:
        remedy = "two drivers could both win: use a store that knows If-None-Match"
        found = [Finding("output", _BAD, f"{store.uri}: a second conditional put was not refused", remedy)]
    if isinstance(store, LocalStore):
        found.append(_disk("output's disk", store.root))
    return [*found, _clock(before, clock, after)]


def _clock(before: float, clock: float, after: float) -> Finding:
    """Hold the store's clock, which tells whole seconds, against ours before and after it was asked."""
    skew = max(before - 1 - clock, clock - after, 0.0)
    told = f"{skew:,.0f} s between this machine and the store"
    if skew > _BAD_SKEW:
        return Finding("clock", _BAD, told, "set this machine's clock: S3 refuses requests that are 15 minutes off")
    return Finding("clock", _ODD, told, "let NTP set the clock") if skew > _ODD_SKEW else _fine("clock", told)
