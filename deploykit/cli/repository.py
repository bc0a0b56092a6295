"""``deploykit repository``: lay a bundle out for a model server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli.output import BundleArgument, JsonFlag, show, show_json

if TYPE_CHECKING:
    from deploykit.serving.repository import ServedModel

EXAMPLE = f"Example: deploykit repository resnet18-{EVALUATOR}-fp32 --layout triton -o models"


def repository(
    bundle: BundleArgument,
    *,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            metavar="triton|triton-python|ovms|kserve",
            help="Triton by its own backend, or by deploykit in its Python backend; Intel's model server; or MLServer, "
            "which KServe runs.",
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FOLDER", help="The folder of models; made where there is none.")
    ],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Of the model.", show_default="the backbone's")
    ] = None,
    version: Annotated[int, typer.Option("--version", metavar="N", help="The model's version.")] = 1,
    json: JsonFlag = False,
) -> None:
    """Add a bundle to the model repository of a server; the engine's files stay as they are, byte for byte.

    Another version of a model is added beside the earlier ones.
    """
    from deploykit.serving.repository import Layout, write_repository

    done = write_repository(bundle, output, layout=cast("Layout", layout), name=name, version=version)
    if json:
        show_json(done)
        return
    show(*served_lines(done), f"Next: {done.start}")


def served_lines(done: ServedModel) -> list[str]:
    """Return what is printed of a model that was added to a repository."""
    added = (
        f"Added {done.name}, version {done.version}, to {done.repository} for {done.layout}: {', '.join(done.files)}."
    )
    return [added, *(f"Note: {note}" for note in done.notes)]
