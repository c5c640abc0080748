"""Commands that make a data set of an output: export."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from sdbatch import dataset
from sdbatch.cli.console import bar, facts, plain, print_json, tell
from sdbatch.cli.results import Json, Output, open_output
from sdbatch.errors import OutputError, StorageError, UsageError
from sdbatch.spec import Picture
from sdbatch.storage import open_store


class Form(StrEnum):
    images = "images"
    webdataset = "webdataset"
    parquet = "parquet"


class Kind(StrEnum):
    png = "png"
    jpeg = "jpeg"
    webp = "webp"


def export(
    output: Output,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Where to: an empty folder or s3://bucket/prefix.")],
    form: Annotated[Form | None, typer.Option("--format", help="Form of the shards; the job's own left out.")] = None,
    image: Annotated[
        Kind | None, typer.Option("--image", help="Encode pictures anew; left out, they keep their bytes.")
    ] = None,
    quality: Annotated[
        int | None, typer.Option("--quality", min=1, max=100, help="Of jpeg and webp; 90 when left out.")
    ] = None,
    lossless: Annotated[bool, typer.Option("--lossless", help="webp that keeps every pixel.")] = False,
    where: Annotated[
        str | None, typer.Option("--where", help='Only pictures of such rows: "clip_score > 0.3 and seed in [1, 2]".')
    ] = None,
    renditions: Annotated[
        bool, typer.Option("--renditions", help="The job's renditions and thumbnails, too, of the exported pictures.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Store a job's pictures once more in another form, without making any; the same command goes on."""
    form_of = _picture(image, quality, lossless)
    source = open_output(output)
    try:
        to = open_store(target)
    except StorageError as error:
        raise OutputError(f"TARGET: {error}") from None
    with bar("exporting") as update:

        def progress(done: int, total: int) -> None:
            update(done, total, "shards")

        ended = dataset.export(source, to, form and form.value, form_of, where, renditions, progress)
    if as_json:
        print_json(ended)
        return
    tell(f"[green]✓[/] {ended.images:,} pictures are in {plain(ended.target)}")
    facts({"bytes": f"{ended.bytes:,}", "left out": f"{ended.left_out:,}"})
    if ended.unsigned is not None:
        tell(f"  [yellow]![/] what is encoded anew has no signatures, as the job's own has: {plain(ended.unsigned)}")
    if ended.left_behind:
        tell(f"  [yellow]![/] {', '.join(ended.left_behind)} stay behind; with --renditions, elsewhere, they come")
    if ended.unmade:
        tell(f"  [yellow]![/] the job has {ended.unmade:,} images still to make; export again when it is done")


def _picture(image: Kind | None, quality: int | None, lossless: bool) -> Picture | None:
    """How pictures are encoded anew. Raises UsageError for what does not go together."""
    if image is None:
        if quality is not None or lossless:
            raise UsageError("--quality and --lossless say how pictures are encoded anew: give --image, too")
        return None
    if lossless and image is not Kind.webp:
        raise UsageError(f"--lossless: {image.value} has no such form, or no other; use it with --image webp")
    if quality is not None and (lossless or image is Kind.png):
        raise UsageError("--quality: nothing is lost, so there is none to choose; leave it out")
    return Picture(type=image.value, quality=quality or 90, lossless=lossless)
