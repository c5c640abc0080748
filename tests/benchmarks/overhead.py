"""What a picture costs an actor beside the model, measured with ``builtin:null`` in one process without Ray.

    python -m tests.benchmarks.overhead [IMAGES]

CPU time of the whole process, all threads, less what the model itself takes; at 64x64 and 512x512, in the three
formats. Wall time is that of one shard after the other: an actor holds several, so that it hides what waits.

Nothing is removed before all is measured, and nothing should have been for five minutes before: ext4 passes over what
was just removed, inode by inode, when it makes a new file (0.4 ms instead of 0.01 after some thousands).
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.planned import generator, plan

SHARD, BATCH = 256, 8


def measure(folder: Path, form: str, side: int, images: int) -> tuple[float, float]:
    """Milliseconds of CPU and of wall time a picture."""
    spec, job, shards = plan(
        folder,
        images + SHARD,
        SHARD,
        model={"uri": "builtin:null"},
        generate={"width": side, "height": side},
        output={"format": form},
        resources={"batch_size": BATCH},
    )
    actor = generator(spec, job)
    drawing = 0.0
    draw = actor.model.draw

    def timed(*given: Any) -> Any:
        nonlocal drawing
        began = time.thread_time()
        drawn = draw(*given)
        drawing += time.thread_time() - began
        return drawn

    actor.model.draw = timed  # type: ignore[method-assign]
    actor.run_shard(shards[0])
    drawing, cpu, wall = 0.0, time.process_time(), time.perf_counter()
    for shard in shards[1:]:
        actor.run_shard(shard)
    cpu, wall = time.process_time() - cpu - drawing, time.perf_counter() - wall - drawing
    return 1e3 * cpu / images, 1e3 * wall / images


def main(images: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for side, form in itertools.product((64, 512), ("images", "webdataset", "parquet")):
            here = Path(folder, f"{form}-{side}")
            cpu, wall = measure(here, form, side, images if side == 64 else images // 4)
            print(f"{side}x{side}, {form}: {cpu:.3f} ms of CPU, {wall:.3f} ms of wall time a picture", flush=True)


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] or ["2048"])))
