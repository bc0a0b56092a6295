"""``deploykit extract``: the features of every image of a source, in one Parquet file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli.image_progress import image_progress
from deploykit.cli.output import (
    DeviceOption,
    JsonFlag,
    RayFlag,
    ThreadsOption,
    TrustOption,
    WorkersOption,
    show,
    show_json,
)
from deploykit.extraction import SHARD

if TYPE_CHECKING:
    from deploykit.extraction import Extraction

EXAMPLE = f"Example: deploykit extract photos --bundle resnet18-{EVALUATOR}-fp32 -o features.parquet"


def extract(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder, a .csv or .tsv file, a .npz file, or an image.")
    ],
    *,
    bundle: Annotated[
        str, typer.Option("--bundle", metavar="BUNDLE", help="The folder that `deploykit export` wrote.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE.parquet", help="The file to write.")],
    whole: Annotated[
        bool, typer.Option("--whole", help="Keep every value of feature maps, instead of each channel's mean.")
    ] = False,
    shard: Annotated[
        int, typer.Option("--shard", metavar="ROWS", help="Rows that are written at a time; a stopped run keeps them.")
    ] = SHARD,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Write the reason in place of the features of unreadable images.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    trust: TrustOption = None,
    ray: RayFlag = False,
    workers: WorkersOption = None,
    json: JsonFlag = False,
) -> None:
    """Run a bundle on any number of images and write one row an image; a stopped run goes on where it was.

    Rows have the image, its label where there are labels, and each output as a list; feature maps are averaged over
    their positions.
    """
    from deploykit.extraction import extract as run

    with image_progress("extract") as progress:
        found = run(
            source,
            bundle,
            output,
            pool=not whole,
            shard=shard,
            skip_corrupt=skip_corrupt,
            overwrite=overwrite,
            device=device,
            threads=threads,
            trust=trust,
            ray=ray,
            workers=workers,
            progress=progress,
        )
    if json:
        show_json(found)
        return
    show(_told(found))


def _told(found: Extraction) -> str:
    resumed = f", {found.resumed} of them from a stopped run" if found.resumed else ""
    skipped = f"; without features: {found.skipped}" if found.skipped else ""
    return f"Wrote {found.output}: {found.rows} rows{resumed}{skipped}."
