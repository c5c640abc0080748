"""The train command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdbatch.cli.console import bar, facts, tell
from sdbatch.errors import OutputError
from sdbatch.training import Recipe

_RECIPE = Recipe()


def train(
    folder: Annotated[
        Path, typer.Argument(help="Where the training keeps its state; the model comes into FOLDER/model.")
    ],
    seed: Annotated[int, typer.Option(help="Of everything random.")] = _RECIPE.seed,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = _RECIPE.workers,
    pictures: Annotated[int, typer.Option(min=128, help="Pictures in the training set.")] = _RECIPE.pictures,
    vae_steps: Annotated[int, typer.Option(min=1, help="Steps of the VAE.")] = _RECIPE.vae_steps,
    steps: Annotated[int, typer.Option(min=1, help="Steps of text encoder and U-Net.")] = _RECIPE.steps,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a worker and step.")] = _RECIPE.batch,
) -> None:
    """Train a text-to-image model from nothing on drawn shapes; the same command resumes."""
    from sdbatch.training import trainer  # torch takes seconds to import

    recipe = Recipe(seed=seed, workers=workers, pictures=pictures, vae_steps=vae_steps, steps=steps, batch=batch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}") from None
    said = ""
    with bar("training") as update:

        def progress(stage: str, done: int, total: int, text: str) -> None:
            nonlocal said
            said = text
            update(done, total, text, label=f"training: {stage}")

        trainer.run(recipe, folder, folder / "model", progress)
    tell(f"[green]✓[/] trained: {folder / 'model'}")
    facts({"probe": said, "use it": f"model: {{uri: {folder / 'model'}}}"})
