"""``deploykit pull``: get a bundle that was pushed."""

from __future__ import annotations

from typing import Annotated

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli.output import JsonFlag, SignedByOption, show, show_json, size_text

EXAMPLE = f"Example: deploykit pull hf://owner/resnet18-{EVALUATOR} -o resnet18-{EVALUATOR}-fp32"


def pull(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="hf://owner/name[@revision][/folder], oci:PATH[:tag], or oci:PATH@sha256:..."
        ),
    ],
    *,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
    signed_by: SignedByOption = None,
    json: JsonFlag = False,
) -> None:
    """Pull a bundle from a model hub repository or an OCI image layout; nothing is written where a file was changed.

    The revision is kept in the bundle, where `deploykit inspect` shows it.
    """
    from deploykit.shipping.transfer import pull_bundle

    done = pull_bundle(source, output, overwrite=overwrite, signed_by=signed_by)
    if json:
        show_json(done)
        return
    signed = "" if not done.signed else f", signed by {signed_by}" if signed_by else ", signed (not checked)"
    show(
        f"Pulled {done.address} to {done.bundle}: {done.files} files, {size_text(done.size)}{signed}.",
        f"Revision {done.revision}; {done.pinned} always gives these bytes.",
        f"Next: deploykit verify {done.bundle}",
    )
