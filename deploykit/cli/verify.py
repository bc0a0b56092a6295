"""``deploykit verify``: is a bundle whole, and are its engine's numbers still within the budget?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli.exit_codes import DRIFT, failure
from deploykit.cli.output import (
    DeviceOption,
    JsonFlag,
    SignedByOption,
    ThreadsOption,
    TrustOption,
    show,
    show_error,
    show_json,
    show_warning,
)
from deploykit.cli.spellings import as_options
from deploykit.cli.verify_layers import LayersAsked, show_layers, walk_layers
from deploykit.errors import BundleError, DeployKitError, DeviceUnavailable, SpecError

if TYPE_CHECKING:
    from deploykit.parity.budget import Budget
    from deploykit.parity.report import ParityReport

EXAMPLE = f"Example: deploykit verify resnet18-{EVALUATOR}-fp32"


DebugFlag = Annotated[
    bool,
    typer.Option(
        "--debug", help="On a failure, write the smallest part of the graph that fails, through polygraphy (minutes)."
    ),
]


RecordFlag = Annotated[
    bool,
    typer.Option(
        "--record", help="Write into the bundle what was seen of its engine, and on which machine and versions."
    ),
]


ImagesOption = Annotated[
    list[str] | None,
    typer.Option("--images", metavar="PATH", help="Image files or folders that the bundle does not carry; repeatable."),
]


SkipCorruptFlag = Annotated[
    bool, typer.Option("--skip-corrupt", help="Leave out unreadable files of --images, with a warning.")
]


ReferenceOption = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="BUNDLE",
        help="Another bundle of the same network, such as FP32, to compare with.",
    ),
]


MinSqnrOption = Annotated[
    float | None,
    typer.Option(
        "--min-sqnr-db", metavar="DB", help="What every output must reach.", show_default="as the bundle was exported"
    ),
]


MinAgreementOption = Annotated[
    float | None,
    typer.Option(
        "--min-top1-agreement",
        metavar="SHARE",
        help="The share of images, 0 to 1, that must get torch's class.",
        show_default="as the bundle was exported",
    ),
]


MaxDropOption = Annotated[
    float | None,
    typer.Option(
        "--max-drop-db", metavar="DB", help="How much farther from torch than when exported an output may be."
    ),
]


LayersFlag = Annotated[
    bool,
    typer.Option(
        "--layers",
        help="Also walk the layers of an engine that is an ONNX graph, beside those of --reference, of torch with "
        "--weights, or of itself with its activations in float, and name the culprit (needs the extra export).",
    ),
]


InRuntimeOption = Annotated[
    str | None,
    typer.Option(
        "--in-runtime",
        metavar="RUNTIME",
        help="With --layers: compare each layer with what this runtime makes of it, such as another one than the "
        "bundle's.",
    ),
]


LayerPretrainedFlag = Annotated[
    bool,
    typer.Option("--pretrained", help="With --layers: compare each layer with torch, with the default weights."),
]


LayerWeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FILE|TAG",
        help="With --layers: compare each layer with torch, with the checkpoint that was exported.",
    ),
]


LayerKeyOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint-key",
        metavar="KEY",
        help="Which of several state dicts in the file of --weights.",
        show_default="averaged weights first",
    ),
]


def verify(
    bundles: Annotated[list[str], typer.Argument(metavar="BUNDLE...", help="Folders that `deploykit export` wrote.")],
    *,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    trust: TrustOption = None,
    signed_by: SignedByOption = None,
    record: RecordFlag = False,
    images: ImagesOption = None,
    skip_corrupt: SkipCorruptFlag = False,
    reference: ReferenceOption = None,
    min_sqnr_db: MinSqnrOption = None,
    min_top1_agreement: MinAgreementOption = None,
    max_drop_db: MaxDropOption = None,
    layers: LayersFlag = False,
    in_runtime: InRuntimeOption = None,
    pretrained: LayerPretrainedFlag = False,
    weights: LayerWeightsOption = None,
    checkpoint_key: LayerKeyOption = None,
    debug: DebugFlag = False,
    json: JsonFlag = False,
) -> None:
    """Check every file of a bundle, run its engine, and compare with torch's outputs and with its own of the export.

    Needs no torch and no weights (--debug needs the extras export and debug). Exit code 0: every bundle is whole and
    within the budget; 1: one is outside; 3, 4, 5 and 6: one is damaged, or could not be run.
    """
    from deploykit.parity.budget import Budget

    asked = LayersAsked(
        reference=reference,
        in_runtime=in_runtime,
        pretrained=pretrained,
        weights=weights,
        checkpoint_key=checkpoint_key,
    )
    if not layers and asked != LayersAsked(reference=reference):
        alone = "--in-runtime" if in_runtime is not None else "--weights" if weights is not None else "--pretrained"
        raise SpecError(f"{alone} goes with --layers. Fix: give both.")
    budget = Budget(min_sqnr_db=min_sqnr_db, min_top1_agreement=min_top1_agreement, max_drop_db=max_drop_db)
    options: VerifyOptions = {
        "device": device,
        "record": record,
        "images": images or None,
        "skip_corrupt": skip_corrupt,
        "reference": reference,
        "budget": budget,
        "threads": threads,
        "trust": trust,
        "signed_by": signed_by,
    }
    walked = asked if layers else None
    results = [_verify(bundle, options, walked=walked, debug=debug, quiet=json) for bundle in bundles]
    passed = all(result["passed"] for result in results)
    if json:
        show_json(results[0] if len(results) == 1 else {"passed": passed, "bundles": results})
    elif len(results) > 1:
        failed = [str(result["bundle"]) for result in results if not result["passed"]]
        show(f"{len(results) - len(failed)} of {len(results)} bundles passed{_list(failed)}.")
    if not passed:
        raise typer.Exit(max(int(str(result["exit_code"])) for result in results))


class VerifyOptions(TypedDict):
    """What `deploykit.verification.verify_bundle` is asked beside the bundle."""

    device: str
    record: bool
    images: list[str] | None
    skip_corrupt: bool
    reference: str | None
    budget: Budget
    threads: int | None
    trust: bool | None
    signed_by: str | None


def _list(failed: list[str]) -> str:
    return f"; not {', '.join(failed)}" if failed else ""


def _verify(
    bundle: str, options: VerifyOptions, *, walked: LayersAsked | None, debug: bool, quiet: bool
) -> dict[str, object]:
    """Verify one bundle; show what was found, unless ``quiet``, and return it for JSON."""
    from deploykit.verification import verify_bundle

    try:
        report = verify_bundle(bundle, **options)
    except DeployKitError as error:
        message = as_options(_explain(bundle, error))
        show_error(message)
        if debug and not isinstance(error, (BundleError, SpecError)):
            _reduce(bundle)
        return {"bundle": bundle, "passed": False, **failure(error, message)}
    if not quiet:
        _show(bundle, report)
    result: dict[str, object] = {
        "bundle": bundle,
        "passed": report.passed,
        "exit_code": 0 if report.passed else DRIFT,
        "report": report,
    }
    if walked is not None:
        result |= _layers(bundle, walked, passed=report.passed, quiet=quiet)
    if debug and not report.passed:
        _reduce(bundle)
    return result


def _layers(bundle: str, asked: LayersAsked, *, passed: bool, quiet: bool) -> dict[str, object]:
    """Walk the layers; where that cannot be done, what verifying found stays beside the error."""
    try:
        found = walk_layers(bundle, asked)
    except DeployKitError as error:
        message = as_options(str(error))
        show_error(message)
        told = failure(error, message)
        return told | {"passed": False, "exit_code": told["exit_code"] if passed else DRIFT}
    if not quiet:
        show_layers(bundle, found)
    return {"layers": found, "culprit": found.culprit}


def _show(bundle: str, report: ParityReport) -> None:
    for each in (report, *report.further):
        show(each.render())
    show(*(f"{level.name}: {'; '.join(level.faults)}" for level in report.failures() if level.faults))
    show(*(f"note: {note}." for note in report.notes()))
    if report.passed:
        device = f"A simulator ran it. Copy it to its device, and run there: deploykit verify {bundle} --record"
        show(f"{bundle} is whole and within its budget.", device if report.is_simulated else _next(bundle))
        return
    names = ", ".join(level.name for level in report.failures()) or "no level was compared"
    show(
        f"{bundle} is whole, and OUTSIDE its budget: {names}.",
        f"Next: deploykit inspect {bundle} shows what it gave when it was exported.",
    )


def _next(bundle: str) -> str:
    """Return what to do with a bundle that passed: keep what was seen where its manifest says less, else run it."""
    from deploykit.bundle import read_manifest

    if read_manifest(Path(bundle)).status == "parity_checked":
        return f"Next: deploykit run {bundle} IMAGE"
    return f"Its manifest says less than was seen here. Next: deploykit verify {bundle} --record"


def _reduce(bundle: str) -> None:
    """Write the smallest part that fails into the current folder, and say on stderr what was found."""
    from deploykit.export.reduce import reduce_bundle

    output = Path(f"{Path(bundle).absolute().name}-reduced.onnx")
    try:
        problem = reduce_bundle(Path(bundle), output)
    except DeployKitError as error:
        show_warning(f"debug: {error}")
        return
    if problem is None:
        show_warning(
            "debug: the runtime computes the graph as it is written, so the error is one of conversion or "
            f"quantization. Next: deploykit inspect {bundle} shows every level."
        )
    elif output.exists():
        show_warning(f"debug: the smallest part that fails is {output}: {problem}")
    else:
        show_warning(f"debug: no smaller part fails than the whole graph: {problem}")


def _explain(bundle: str, error: DeployKitError) -> str:
    """Return the error's message; before it, that nobody has ever run the engine, where that is so."""
    from deploykit.bundle import read_manifest

    if isinstance(error, DeviceUnavailable) and read_manifest(Path(bundle)).status == "built":
        return f"{bundle} was built and never executed, so its numbers are not verified: {error}"
    return str(error)
