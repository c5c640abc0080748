"""The train and finetune commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sdbatch.cli.console import bar, facts, tell
from sdbatch.errors import OutputError, UsageError
from sdbatch.spec import Resources
from sdbatch.training import FineTuning, Recipe

_RECIPE, _TUNING = Recipe(), FineTuning()


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class Prediction(StrEnum):
    v_prediction = "v_prediction"
    epsilon = "epsilon"


Folder = Annotated[Path, typer.Argument(help="Where the training keeps its state and leaves its result.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes; more than one are placed by Ray Train.")]
On = Annotated[Device, typer.Option(help="What each worker trains on.")]
Accumulate = Annotated[int, typer.Option(min=1, help="Batches whose gradients make one step.")]


def train(
    folder: Folder,
    seed: Seed = _RECIPE.seed,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help=f"As of finetune; {_RECIPE.workers} when left out, on a GPU 1."),
    ] = None,
    device: On = Device.cpu,
    pictures: Annotated[int, typer.Option(min=128, help="Pictures in the training set.")] = _RECIPE.pictures,
    vae_steps: Annotated[int, typer.Option(min=1, help="Steps of the VAE.")] = _RECIPE.vae_steps,
    clip_steps: Annotated[int, typer.Option(min=1, help="Steps of the CLIP.")] = _RECIPE.clip_steps,
    steps: Annotated[int, typer.Option(min=1, help="Steps of text encoder and U-Net.")] = _RECIPE.steps,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a worker and batch.")] = _RECIPE.batch,
    prediction_type: Annotated[
        Prediction, typer.Option(help="What the U-Net learns to say.")
    ] = Prediction.v_prediction,
    accumulate: Accumulate = _RECIPE.accumulate,
) -> None:
    """Train a text-to-image model from nothing on drawn shapes; the same command resumes.

    FOLDER/model and FOLDER/scorer are the result, FOLDER/samples and FOLDER/tensorboard show how it went.
    """
    from sdbatch.training import trainer  # torch takes seconds to import

    workers = workers or (1 if device is Device.cuda else _RECIPE.workers)
    recipe = Recipe(
        seed=seed,
        workers=workers,
        device=device.value,
        pictures=pictures,
        vae_steps=vae_steps,
        clip_steps=clip_steps,
        steps=steps,
        batch=batch,
        prediction_type=prediction_type.value,
        accumulate=accumulate,
    )
    with _crew(folder, workers, device), _progress("training") as progress:
        trainer.run(recipe, folder, progress)
    tell(f"[green]✓[/] trained: {escape(str(folder / 'model'))}")
    facts(
        {
            "samples": escape(str(folder / "samples")),
            "curves": f"tensorboard --logdir {escape(str(folder / 'tensorboard'))}",
            "score": f"sdbatch evaluate {escape(str(folder / 'model'))} {escape(str(folder / 'evaluation'))}",
            "use it": f"model: {{uri: {escape(str(folder / 'model'))}}}",
        }
    )


def finetune(
    model: Annotated[str, typer.Argument(help="builtin:NAME, hf:OWNER/NAME, a folder or a single .safetensors file.")],
    pictures: Annotated[Path, typer.Argument(help="A folder of captioned pictures, or WebDataset .tar files.")],
    folder: Folder,
    full: Annotated[bool, typer.Option("--full", help="Train all weights of the U-Net instead of a LoRA.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help=f"Of the LoRA; {_TUNING.rank} when left out.")] = None,
    text_encoder: Annotated[
        bool, typer.Option("--text-encoder", help="Train the text encoders, too.")
    ] = _TUNING.text_encoder,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")] = _TUNING.steps,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a worker and batch.")] = _TUNING.batch,
    accumulate: Accumulate = _TUNING.accumulate,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=1e-9, help="At its highest; 1e-4 for a LoRA, 1e-5 for all weights when left out."),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=8, help="Pixels, each way; the model's own when left out.")
    ] = None,
    sample_prompt: Annotated[
        list[str], typer.Option(help="Drawn now and then; the first captions when left out.")
    ] = [],  # noqa: B006
    tokenizer: Annotated[str | None, typer.Option(help="As model.tokenizer of a job.")] = None,
    prediction_type: Annotated[str | None, typer.Option(help="As model.prediction_type of a job.")] = None,
    seed: Seed = _TUNING.seed,
    workers: Workers = _TUNING.workers,
    device: On = Device.cpu,
) -> None:
    """Fine-tune a model on captioned pictures, as a LoRA or whole; the same command resumes.

    FOLDER/lora (or FOLDER/model) is the result, FOLDER/samples and FOLDER/tensorboard show how it went.
    """
    from sdbatch.training import finetuning

    if full and rank is not None:
        raise UsageError("--rank is of a LoRA; leave it out with --full")
    recipe = FineTuning(
        rank=rank or _TUNING.rank,
        full=full,
        text_encoder=text_encoder,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        learning_rate=learning_rate,
        resolution=resolution,
        tokenizer=tokenizer,
        prediction_type=prediction_type,
        sample_prompts=tuple(sample_prompt),
        seed=seed,
        workers=workers,
        device=device.value,
    )
    with _crew(folder, workers, device), _progress("fine-tuning") as progress:
        result = finetuning.run(recipe, model, pictures, folder, progress)
    tell(f"[green]✓[/] fine-tuned: {escape(str(result))}")
    named = {"uri": model, "tokenizer": tokenizer, "prediction_type": prediction_type}
    base = ", ".join(f"{field}: {value}" for field, value in named.items() if value is not None)
    use = f"model: {{uri: {result}}}" if full else f"model: {{{base}, loras: [{{uri: {result}}}]}}"
    facts({"samples": escape(str(folder / "samples")), "use it": escape(use)})


@contextmanager
def _crew(folder: Path, workers: int, device: Device) -> Iterator[None]:
    """What trains into a folder: Ray where several workers need it."""
    try:
        if workers == 1:
            yield
            return
        from sdbatch.engine.cluster import await_room, ray_session

        resources = Resources(actors=workers, gpus_per_actor=1 if device is Device.cuda else 0)
        with ray_session(resources):
            await_room(resources)
            yield
    except OSError as error:  # no right to write, no room
        raise OutputError(f"{error.filename or folder}: {error.strerror or error}") from None


@contextmanager
def _progress(label: str) -> Iterator[Callable[[str, int, int, str], None]]:
    with bar(label) as update:
        yield lambda stage, done, total, text: update(done, total, text, label=f"{label}: {stage}")
