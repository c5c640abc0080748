"""An evaluation from end to end: prompts, the job that makes their pictures, what they show.

OUTPUT/prompts.parquet   what is asked for, and the scene that each prompt tells
OUTPUT/pictures/         the output of an ordinary job
OUTPUT/fidelity.json     the rates with their intervals; .md and .png are the same for people
OUTPUT/sheet.png         the first pictures of each cell
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdbatch.engine.models.null import NULL
from sdbatch.errors import JobFailed, OutputError, PlanChanged, UsageError, told_of
from sdbatch.evaluation import fidelity as fidelities
from sdbatch.evaluation.fidelity import Fidelity
from sdbatch.evaluation.pictures import read_back
from sdbatch.evaluation.plot import draw_plot
from sdbatch.evaluation.prompts import Setting, prompt_table, to_parquet
from sdbatch.evaluation.sheet import draw_sheet
from sdbatch.evaluation.tables import markdown
from sdbatch.ledger import find_job, read_job, read_status
from sdbatch.outputs import read_pictures
from sdbatch.spec import JobSpec, literal, load_spec
from sdbatch.storage import Store, open_store
from sdbatch.storage.parquet import read_parquet

PROMPTS = "prompts.parquet"
RESULTS = {"rates": "fidelity.json", "tables": "fidelity.md", "plot": "fidelity.png", "pictures": "sheet.png"}
_TEMPLATE = Path(__file__).with_name("job.yaml")

#: Fields that ``--set`` can't change, and what to do.
_ELSEWHERE = {
    "generate.sampler": "say it by --sampler",
    "generate.num_inference_steps": "say it by --steps",
    "generate.guidance_scale": "say it by --guidance",
    "generate.seed": "say it by --seed",
    "generate.num_images_per_prompt": "say it by --prompts-per-cell",
    "input.columns": "leave it out: the evaluation has columns of its own",
    "input.keep": "leave it out: the evaluation has columns of its own",
    "input.uri": "say it by --prompts-per-cell and --seed",
    "model.uri": "say it by MODEL",
    "output.uri": "say it by OUTPUT",
}


@dataclass(frozen=True)
class Evaluation:
    """What is asked for: the job ``spec``, which runs as any other, and how its prompts came about."""

    spec: JobSpec
    store: Store  # of OUTPUT; the job's own lies below it
    settings: tuple[Setting, ...]
    prompts_per_cell: int
    seed: int


def prepare(
    model: str,
    output: str,
    settings: Sequence[Setting],
    prompts_per_cell: int,
    seed: int,
    overrides: Sequence[str] = (),
) -> Evaluation:
    """Check everything and write the prompts. Raises UsageError; PlanChanged where OUTPUT has other prompts."""
    if model == NULL:
        raise UsageError(f"MODEL: {NULL} reads no prompts; there is nothing to evaluate")
    for override in overrides:
        field = override.partition("=")[0].strip()
        for fixed, instead in _ELSEWHERE.items():
            if field == fixed or field.startswith(f"{fixed}."):
                raise UsageError(f"--set {field}: {instead}")
    with told_of("OUTPUT", OutputError):
        store = open_store(output)
        made = find_job(open_store(f"{store.uri}/pictures"))
        spec = _spec(model, store, settings, overrides)
        table = prompt_table(settings, prompts_per_cell, seed)
        if made is None:
            store.put(PROMPTS, to_parquet(table))
        elif not read_parquet(store.get(PROMPTS)).equals(table):
            raise PlanChanged(
                f"{store.uri} holds pictures of other prompts, samplers, steps or guidance; choose another output"
            )
    return Evaluation(spec, store, tuple(dict.fromkeys(settings)), prompts_per_cell, seed)


def _spec(model: str, store: Store, settings: Sequence[Setting], overrides: Sequence[str]) -> JobSpec:
    """The job for all settings at once; each setting is checked as a job spec of its own would be."""
    uris = {"model.uri": model, "input.uri": f"{store.uri}/{PROMPTS}", "output.uri": f"{store.uri}/pictures"}
    common = [f"{field}={json.dumps(literal(uri))}" for field, uri in uris.items()] + list(overrides)
    for setting in settings:
        own = [f"generate.{field}={json.dumps(value)}" for field, value in asdict(setting).items()]
        load_spec(_TEMPLATE, [*common, *own])
    return load_spec(_TEMPLATE, common)


def measure(evaluation: Evaluation, progress: Callable[[int, int], None]) -> tuple[Fidelity, dict[str, Any]]:
    """Read the pictures back, write what they show beside them, and return it, also as fidelity.json has it.

    Needs Ray, and the job to be complete; ``progress`` hears how many shards of how many are read.
    """
    store, pictures = evaluation.store, open_store(evaluation.spec.output.uri)
    readings = read_back(pictures, progress)
    if not readings:
        raise JobFailed(f"no picture was made; see 'sdbatch errors {pictures.uri}'")
    found = fidelities.measure(readings, evaluation.settings)
    content = {
        "model": evaluation.spec.model.uri,
        "model_sha256": read_job(pictures).model_sha256,
        "seed": evaluation.seed,
        "prompts_per_cell": evaluation.prompts_per_cell,
        "pictures": len(readings),
        "quarantined": read_status(pictures).quarantined,
        "settings": found.content(),
    }
    store.put(RESULTS["rates"], json.dumps(content, indent=2).encode())
    store.put(RESULTS["tables"], markdown(found).encode())
    store.put(RESULTS["plot"], draw_plot(found, f"Prompt fidelity of {evaluation.spec.model.name}"))
    store.put(RESULTS["pictures"], draw_sheet(pictures, readings, read_pictures))
    return found, content
