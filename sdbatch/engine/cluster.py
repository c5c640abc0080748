"""Starting or joining Ray."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout

import ray
from ray.exceptions import AuthenticationError

from sdbatch.engine.machine import cpus
from sdbatch.errors import JobFailed, UsageError
from sdbatch.spec import Resources

#: CPUs that reading the table needs beside the actors.
_READERS = 1
#: What glibc allocates lies on huge pages where the kernel leaves it to programs to ask for them, as most do, and in
#: one arena for all threads: others give memory back, and are given it anew, at every batch. On a CPU each makes some
#: per cent more pictures (docs/performance.md). Read when a process starts, so it is for those that Ray starts.
ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
#: Seconds that nodes may take to come.
_PATIENCE = 1800.0


@contextmanager
def ray_session(resources: Resources) -> Iterator[None]:
    """Ray for the length of a command: the cluster at RAY_ADDRESS, else one of our own on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors without a GPU: what Ray will do anyway
    connects = not ray.is_initialized()
    own = connects and not os.environ.get("RAY_ADDRESS")
    if own:
        os.environ.setdefault("GLIBC_TUNABLES", ALLOCATOR)
    with redirect_stdout(sys.stderr):  # Ray tells of dead workers on stdout, to its very end; that is for our results
        if connects:
            _start(resources, own)
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            yield
        finally:
            if connects:  # a cluster stays, but would go on telling us of its dead
                with _held_back():
                    ray.shutdown()


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals wait until this is over: Ray half started or half ended takes the process with it in a way of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = list[int]()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray leaves this process's signals alone, which its own handlers end without a word. Workers keep theirs."""
    # Ray's crash handler lets go of SIGTERM at its end, but to the default.
    ray._private.ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    utils = ray._private.utils
    theirs, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs


def _start(resources: Resources, own: bool) -> None:
    # Logical CPUs: the machine's own, but never fewer than the job asks for, or nothing would ever start.
    at_least = max(cpus(), resources.fewest * resources.cpus_per_actor + _READERS)
    try:
        with _own_signals(), _held_back() if own else nullcontext():
            ray.init(
                address="local" if own else None,
                num_cpus=at_least if own else None,
                include_dashboard=False if own else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except SystemError:  # a signal in the midst of one of Ray's own calls
        raise
    except Exception as error:  # Ray raises many kinds, and Exception itself
        told = " ".join(str(error).split())
        if own:
            raise JobFailed(f"Ray does not start here: {told}; is it too busy, or the disk full?") from None
        raise _not_joined(error, f"RAY_ADDRESS: no Ray at {os.environ.get('RAY_ADDRESS')}: {told}") from None


def _not_joined(error: Exception, told: str) -> JobFailed | UsageError:
    """An address, version or token that is wrong, or else a cluster that may be up another time."""
    if isinstance(error, (ValueError, AuthenticationError)) or "Version mismatch" in told:
        return UsageError(f"{told}; check the address, the version there, and RAY_AUTH_MODE")
    return JobFailed(f"{told}; is it up, and the address right?")


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to go: Ray gives them no new actors."""
    return set(ray._private.state.state.get_draining_nodes())  # Ray has no public name for it


def await_room(resources: Resources, on_wait: Callable[[str], None] = lambda told: None) -> None:
    """Wait until some node could hold an actor: a cluster that scales may begin without any.

    Raises UsageError where none can come, on this machine alone, and JobFailed when none came for half an hour.
    """
    if not (told := too_small(resources)):
        return
    if not os.environ.get("RAY_ADDRESS"):
        raise UsageError(told)
    # Whoever scales the cluster goes by what waits for room.
    waiting = ray.remote(num_cpus=resources.cpus_per_actor, num_gpus=resources.gpus_per_actor)(_nothing).remote()
    deadline = time.monotonic() + _PATIENCE
    while not ray.wait([waiting], timeout=1.0)[0]:
        if time.monotonic() > deadline:
            ray.cancel(waiting)
            raise JobFailed(f"{told}; no other node came within {_PATIENCE / 60:.0f} minutes")
        on_wait(f"for a node: {told}")


def _nothing() -> None:
    """What waits for room."""


def too_small(resources: Resources) -> str:
    """That no node which is there now could hold an actor, and what to do; empty where one could."""
    fits = [
        node["Resources"]
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
        and node["Resources"].get("GPU", 0) >= resources.gpus_per_actor
        and node["Resources"].get("CPU", 0) >= resources.cpus_per_actor
    ]
    if fits:
        return ""
    return (
        f"resources: no node of the cluster has {resources.gpus_per_actor:g} GPUs and {resources.cpus_per_actor} "
        "CPUs for an actor; lower resources.gpus_per_actor (0: on the CPU) or resources.cpus_per_actor"
    )
