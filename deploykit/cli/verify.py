"""``deploykit verify``: is a bundle whole, and are its engine's numbers still within the budget?"""

from __future__ import annotations

from pathlib import Path

import typer

from deploykit.cli.output import BundleArgument, DeviceOption, JsonFlag, show, show_error, show_json
from deploykit.errors import DeployKitError, DeviceUnavailable, SpecError

EXAMPLE = "Example: deploykit verify resnet18-onnxruntime-fp32"


def verify(bundle: BundleArgument, device: DeviceOption = "auto", json: JsonFlag = False) -> None:
    """Check every file of a bundle, run its engine on the reference inside, and compare with torch's outputs.

    Needs no torch and no weights. Exit code 0: whole and within the budget; 1: not.
    """
    from deploykit.facade import verify_bundle

    try:
        report = verify_bundle(bundle, device=device)
    except SpecError:
        raise
    except DeployKitError as error:
        message = _explain(bundle, error)
        if json:
            show_json({"bundle": bundle, "passed": False, "error": type(error).__name__, "message": message})
        show_error(message)
        raise typer.Exit(1) from error
    if json:
        show_json({"bundle": bundle, "passed": report.passed, "report": report})
    else:
        show(report.render())
        if report.passed:
            show(f"{bundle} is whole and within its budget.", f"Next: deploykit run {bundle} IMAGE")
        else:
            names = ", ".join(level.name for level in report.failures()) or "no level was compared"
            show(
                f"{bundle} is whole, and OUTSIDE its budget: {names}.",
                f"Next: deploykit inspect {bundle} shows what it gave when it was exported.",
            )
    if not report.passed:
        raise typer.Exit(1)


def _explain(bundle: str, error: DeployKitError) -> str:
    """The error's message; before it, that nobody has ever run the engine, where that is so."""
    from deploykit.bundle import read_manifest

    if isinstance(error, DeviceUnavailable) and read_manifest(Path(bundle)).status == "built":
        return f"{bundle} was built and never executed, so its numbers are not verified: {error}"
    return str(error)
