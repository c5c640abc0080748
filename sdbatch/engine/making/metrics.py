"""What Prometheus gets to know of a job, through Ray: each node's metrics port tells of the processes on it.

All have the tags ``job`` and ``model``; Ray puts ``ray_`` before every name. What is counted, the driver counts: an
actor that goes takes along what it has not told yet, and Ray asks only every ten seconds.
"""

from __future__ import annotations

import time

from ray.util.metrics import Counter, Gauge, Histogram

_TAGS = ("job", "model")
_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
#: Seconds over which the model's share of the time is told.
_WINDOW = 15.0

#: Name → what it says. The dashboard in cluster/ draws all of them.
NAMES = {
    "sdbatch_images_total": "Pictures that were committed",
    "sdbatch_batches_total": "Batches that the model computed",
    "sdbatch_failures_total": "Image requests that were quarantined",
    "sdbatch_actor_deaths_total": "Actors that died and were replaced",
    "sdbatch_planned_images": "Images that are planned",
    "sdbatch_finished_images": "Images that are committed or quarantined, by all runs",
    "sdbatch_actors": "Actors whose model is loaded",
    "sdbatch_stage_seconds": "Seconds of a stage: model and checks (a batch), finish (storing it), commit (a shard)",
    "sdbatch_model_busy_ratio": "Share of the time that an actor's model, and so its GPU, was at work",
}


class DriverMetrics:
    """What the driver tells of the job."""

    def __init__(self, job: str, model: str) -> None:
        tags = {"job": job, "model": model}
        self._images = _counter("sdbatch_images_total", tags)
        self._batches = _counter("sdbatch_batches_total", tags)
        self._failures = _counter("sdbatch_failures_total", tags)
        self._deaths = _counter("sdbatch_actor_deaths_total", tags)
        self._planned = _gauge("sdbatch_planned_images", tags)
        self._finished = _gauge("sdbatch_finished_images", tags)
        self._actors = _gauge("sdbatch_actors", tags)
        self._died = 0

    def counted(self, committed: int, quarantined: int, batches: int) -> None:
        """A shard is done."""
        for counter, more in ((self._images, committed), (self._failures, quarantined), (self._batches, batches)):
            if more > 0:
                counter.inc(more)

    def look(self, planned: int, finished: int, actors: int, deaths: int) -> None:
        """How the job stands; ``deaths`` are those of this run so far."""
        self._planned.set(planned)
        self._finished.set(finished)
        self._actors.set(actors)
        if deaths > self._died:
            self._deaths.inc(deaths - self._died)
            self._died = deaths


class ActorMetrics:
    """What an actor tells of its work."""

    def __init__(self, job: str, model: str) -> None:
        tags = {"job": job, "model": model}
        name = "sdbatch_stage_seconds"
        self._stage = Histogram(name, NAMES[name], _SECONDS, (*_TAGS, "stage")).set_default_tags(tags)
        self._busy = _gauge("sdbatch_model_busy_ratio", tags)
        self._since, self._model_seconds = time.monotonic(), 0.0

    def stage(self, name: str, seconds: float) -> None:
        """A stage took so long."""
        self._stage.observe(max(seconds, 1e-6), {"stage": name})
        if name in {"model", "checks"}:  # its device is at work
            self._model_seconds += seconds

    def look(self) -> None:
        """Tell how busy the model was, every now and then."""
        passed = time.monotonic() - self._since
        if passed >= _WINDOW:
            self._busy.set(min(self._model_seconds / passed, 1.0))
            self._since, self._model_seconds = time.monotonic(), 0.0


def _counter(name: str, tags: dict[str, str]) -> Counter:
    counter = Counter(name, NAMES[name], _TAGS)
    counter.set_default_tags(tags)
    return counter


def _gauge(name: str, tags: dict[str, str]) -> Gauge:
    gauge = Gauge(name, NAMES[name], _TAGS)
    gauge.set_default_tags(tags)
    return gauge
