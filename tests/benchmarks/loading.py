"""What it costs to load a U-Net of SD 1.5's size: CPU time and memory of a process that does nothing else.

    python -m tests.benchmarks.loading

A folder with float16 weights (1.7 GB) is written, loaded by ``Component.load`` in processes of one thread
each, and removed. Peaks are what the process grew by over torch imported, by the size of the file: mapped pages of
the file count while they are resident, though the system takes them back when it needs to; ``private`` leaves them
out. Weights of the wanted format are only mapped: ``touched`` has read every one, as the first picture would.
``float32 memory alone`` is what the system takes to hand out as much memory as the converted weights need.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from sdbatch.diffusion.configs import unet_json
from sdbatch.diffusion.folder import read_unet
from sdbatch.diffusion.unet import UNet, UNetConfig
from sdbatch.diffusion.weights import DTYPES, skeletons, write


def resident() -> tuple[int, int]:
    """Bytes of this process in memory: all, and private."""
    lines = Path("/proc/self/status").read_text().splitlines()
    told = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return int(told["VmRSS"][0]) * 1024, int(told["RssAnon"][0]) * 1024


class Peaks(threading.Thread):
    """The most of ``resident`` while it runs, looked at every hundredth of a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.most = resident()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.01):
            now = resident()
            self.most = max(self.most[0], now[0]), max(self.most[1], now[1])

    def growth(self) -> tuple[int, int]:
        self.ended.set()
        self.join()
        last = resident()
        return max(self.most[0], last[0]) - self.first[0], max(self.most[1], last[1]) - self.first[1]


def load(folder: Path, dtype: str, touch: bool) -> None:
    torch.set_num_threads(1)
    size = (folder / "diffusion_pytorch_model.safetensors").stat().st_size
    peaks = Peaks()
    peaks.start()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    if dtype == "memory":
        torch.empty(2 * size, dtype=torch.uint8).fill_(1)
    else:
        module = read_unet(folder).load("cpu", DTYPES[dtype])
    if touch:
        sum(value.view(-1)[::1024].sum() for value in module.parameters())
    after, ended = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    grown, private = peaks.growth()
    told = {
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "of_these_system": round(after.ru_stime - before.ru_stime, 2),
        "seconds": round(ended - began, 2),
        "peak_ratio": round(grown / size, 2),
        "private_peak_ratio": round(private / size, 2),
    }
    print(json.dumps(told))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "unet"
        with skeletons():
            blanks = UNet(UNetConfig()).state_dict()
        # Any weights do: what random numbers cost is not the question.
        weights = {key: torch.full(value.shape, 0.01, dtype=torch.float16) for key, value in blanks.items()}
        write(folder / "diffusion_pytorch_model.safetensors", weights, torch.float16)
        (folder / "config.json").write_text(json.dumps(unet_json(UNetConfig())))
        del weights
        told: dict[str, Any] = {"file_bytes": (folder / "diffusion_pytorch_model.safetensors").stat().st_size}
        for case, dtype, touch in (
            ("float16", "float16", False),
            ("float16 touched", "float16", True),
            ("float16 to float32", "float32", False),
            ("float32 memory alone", "memory", False),
        ):
            command = [sys.executable, "-m", "tests.benchmarks.loading", str(folder), dtype, str(int(touch))]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            told[case] = json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)
        print(json.dumps(told, indent=2))


if __name__ == "__main__":
    if sys.argv[1:]:
        load(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "1")
    else:
        main()
