"""A report of 100,000 images in headless Chromium: ``python -m tests.benchmarks.report [--images N] [--output DIR]``.

Makes the images with ``builtin:null``, unless ``--output`` names a job that is done, writes its report, and opens it
from the disk. Prints sizes, and milliseconds: to the first paint, to the first pictures, until all rows can be
searched, and from a word in the search field to its result on the screen (the median of several words).
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from sdbatch.outputs import read_pictures
from sdbatch.report import write_report
from sdbatch.storage import open_store
from tests.browser import opened

#: Milliseconds from typing a text into the search field until two frames later, with its result drawn.
SEARCH = """async (text) => {
  const field = document.getElementById("search"), began = performance.now();
  field.value = text;
  field.dispatchEvent(new Event("input"));
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return [performance.now() - began, document.getElementById("count").textContent];
}"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.report")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    output = options.output or make_job(Path(".work/report").absolute(), options.images)
    began = time.perf_counter()
    written = write_report(open_store(str(output)), read_pictures, options.images, lambda done, total: None)
    figures: dict[str, Any] = {
        "images": written.shown,
        "seconds to write": round(time.perf_counter() - began, 1),
        "page, kB": round(written.bytes / 1e3),
        "files beside it": written.files,
        "their MB": round(written.files_bytes / 1e6, 1),
    }
    began = time.perf_counter()
    write_report(open_store(str(output)), read_pictures, options.images, lambda done, total: None)
    figures["seconds to write again"] = round(time.perf_counter() - began, 1)
    print(json.dumps(figures | in_browser(output / "report.html"), indent=2))


def in_browser(page: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with opened(page.absolute().as_uri(), viewport={"width": 1280, "height": 900}) as found:
        found.page.wait_for_selector("#grid img", state="attached")
        figures["ms to the first pictures"] = round(found.page.evaluate("performance.now()"))
        found.until("!document.getElementById('count').textContent.includes('read')")
        figures["ms until all can be searched"] = round(found.page.evaluate("performance.now()"))
        paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        figures["ms to the first paint"] = round(found.page.evaluate(paint))
        words = ["blue star", "number 99123", "square 7", "no such words", "e"]
        taken = [found.page.evaluate(SEARCH, word) for word in words]
        figures["ms to a search result, median"] = round(median(ms for ms, _ in taken))
        figures["ms to a search result, most"] = round(max(ms for ms, _ in taken))
        figures["found"] = {word: told for word, (_, told) in zip(words, taken, strict=True)}
        found.page.evaluate(SEARCH, "blue star")
        began = time.perf_counter()
        found.page.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
        found.until("[...document.querySelectorAll('.frame')].every((frame) => frame.firstChild)")
        figures["ms to pictures half way down"] = round(1000 * (time.perf_counter() - began))
        figures["MB of the script's heap"] = round(found.page.evaluate("performance.memory.usedJSHeapSize") / 1e6)
        figures["said on the console"] = found.said
    return figures


def make_job(folder: Path, images: int) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chance = random.Random(1)
    with (folder / "prompts.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "mood", "score"])
        for i in range(images):
            colour, thing = chance.choice(["red", "blue", "green"]), chance.choice(["circle", "star", "square"])
            prompt = f"a {colour} {thing}, number {i}, on a white background" if i % 97 else ""
            table.writerow([prompt, chance.choice(["calm", "bright"]), f"{chance.gauss(0.3, 0.05):.4f}"])
    spec = {
        "name": "report",
        "input": {"uri": str(folder / "prompts.csv"), "keep": ["mood", "score"]},
        "model": {"uri": "builtin:null"},
        "generate": {"width": 64, "height": 64},
        "output": {"uri": str(folder / "out"), "format": "webdataset"},
        "resources": {"actors": 2, "batch_size": 64},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(spec))
    subprocess.run([sys.executable, "-m", "sdbatch", "run", str(folder / "job.yaml")], check=False)
    return folder / "out"


if __name__ == "__main__":
    main()
