"""``deploykit push``: put a bundle where others get it."""

from __future__ import annotations

from typing import Annotated

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli.output import BundleArgument, JsonFlag, show, show_json, size_text

EXAMPLE = f"Example: deploykit push resnet18-{EVALUATOR}-fp32 hf://owner/resnet18-{EVALUATOR}"


def push(
    bundle: BundleArgument,
    destination: Annotated[
        str,
        typer.Argument(metavar="DESTINATION", help="hf://owner/name[@branch][/folder], or oci:PATH[:tag]."),
    ],
    *,
    message: Annotated[
        str | None, typer.Option("--message", metavar="TEXT", help="Of the commit in a repository of the model hub.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, where it is made now.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Push a bundle to a model hub repository in one commit, or into an OCI image layout under a tag.

    Every file is verified first; digests and signature travel as they are.
    """
    from deploykit.shipping.transfer import push_bundle

    done = push_bundle(bundle, destination, message=message, private=private)
    if json:
        show_json(done)
        return
    signed = ", signed" if done.signed else ""
    show(
        f"Pushed {done.bundle} to {done.address}: {done.files} files, {size_text(done.size)}{signed}.",
        f"Revision {done.revision}.",
        f"Next: deploykit pull {done.pinned} -o FOLDER",
    )
