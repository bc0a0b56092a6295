"""``deploykit sign``: say who made a bundle."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli.output import BundleArgument, JsonFlag, show, show_json

EXAMPLE = f"Example: deploykit sign resnet18-{EVALUATOR}-fp32 --key signer.pem"
PASSWORD = "DEPLOYKIT_KEY_PASSWORD"  # noqa: S105  (the variable's name)


def sign(
    bundle: BundleArgument,
    *,
    key: Annotated[
        str, typer.Option("--key", metavar="FILE", help=f"Your private key, PEM; ${PASSWORD} is its password.")
    ],
    certificate: Annotated[
        str | None, typer.Option("--certificate", metavar="FILE", help="Your key's certificate, PEM.")
    ] = None,
    chain: Annotated[
        list[str] | None,
        typer.Option("--chain", metavar="FILE", help="A certificate between yours and the authority's; repeatable."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Sign every file of a bundle in the OpenSSF model-signing format, and keep the signature in it as model.sig.

    run and verify check it with --signed-by, and so does `model_signing verify`.
    """
    from deploykit.signatures import sign_bundle

    password = os.environ.get(PASSWORD)
    written = sign_bundle(bundle, key, password=password, certificate=certificate, chain=chain or ())
    if json:
        show_json({"bundle": bundle, "signature": str(written)})
    else:
        show(f"{bundle} is signed: {written}.", f"Next: deploykit verify {bundle} --signed-by PUBLIC_KEY.pem")
