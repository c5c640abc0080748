"""What can be watched while a model trains: progress, TensorBoard, sheets of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdbatch.diffusion.pipeline import LatentDiffusion
from sdbatch.training.loop import Step, rank

#: stage, done, total, text beside the bar
Progress = Callable[[str, int, int, str], None]

_EVERY = 10  # steps between two points of a curve


class Monitor:
    """Tells the leading worker's progress and keeps curves and samples in ``folder``.

    FOLDER/tensorboard/   curves, where TensorBoard is installed
    FOLDER/samples/       one sheet of pictures at each look
    """

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._leads = rank() == 0
        self._folder = folder
        self._progress = progress
        self._board = _board(folder / "tensorboard") if self._leads else None

    def told(self, stage: str, done: int, total: int, text: str = "") -> None:
        if self._leads:
            self._progress(stage, done, total, text)

    def step(self, step: Step) -> None:
        self.told(step.stage, step.done, step.total, f"loss {step.loss:.4f} · {step.seconds:.2f} s/step")
        if self._board is not None and step.done % _EVERY == 0:
            values = {"loss": step.loss, "gradient_norm": step.gradient_norm, "learning_rate": step.learning_rate}
            self.numbers(step.stage, values, step.done)

    def numbers(self, group: str, values: Mapping[str, float], step: int) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    def samples(
        self,
        model: LatentDiffusion,
        prompts: Sequence[str],
        step: int,
        *,
        steps: int,
        batch: int,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Draw the prompts in so many ``steps``, always from the same seeds, ``batch`` at once, as a sheet."""
        width, height = size or model.default_size
        settings: dict[str, Any] = {"width": width, "height": height, "num_inference_steps": steps}
        parts = [
            model.generate(part, seeds=range(start, start + len(part)), sampler="dpmpp_2m", **settings)
            for start in range(0, len(prompts), batch)
            if (part := prompts[start : start + batch])
        ]
        sheet = contact_sheet(np.concatenate(parts))
        path = self._folder / "samples" / f"{step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(path)
        if self._board is not None:
            self._board.add_image("samples", sheet, step, dataformats="HWC")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def contact_sheet(pictures: np.ndarray, columns: int = 8) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8 side by side in rows of ``columns``, white where there are too few."""
    count, height, width, _ = pictures.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height, width, 3), 255, np.uint8)
    sheet[:count] = pictures
    return sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # it comes with the extra "training"
        return None
    return SummaryWriter(str(folder))
