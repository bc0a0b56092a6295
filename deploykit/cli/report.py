"""``deploykit report``: one page on bundles, for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli.output import DeviceOption, JsonFlag, ThreadsOption, TrustOption, show, show_json, size_text

if TYPE_CHECKING:
    from deploykit.reports.facts import BundleFacts

EXAMPLE = f"Example: deploykit report resnet18-{EVALUATOR}-fp32 resnet18-{EVALUATOR}-int8 -o report.html"


def report(
    bundles: Annotated[list[str], typer.Argument(metavar="BUNDLE...", help="Folders that `deploykit export` wrote.")],
    *,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="The page: .html, or .md for a pull request.")
    ],
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Run the engines here, or show what the bundles say of themselves.")
    ] = True,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Also walk the layers of engines that are ONNX graphs (needs the extra export)."),
    ] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    trust: TrustOption = None,
    json: JsonFlag = False,
) -> None:
    """Write one page on bundles: each level's error, latency against accuracy, what quantizer and passes did.

    The HTML page needs no other file and no network (it needs the extra plot, the Markdown page nothing). Exit
    code 0: written, whatever it says.
    """
    from deploykit.reports.write import write_report

    facts = write_report(bundles, output, run=run, layers=layers, device=device, threads=threads, trust=trust)
    if json:
        show_json({"report": output, "bundles": [_told(each) for each in facts]})
        return
    size = size_text(Path(output).stat().st_size)
    failed = [each.name for each in facts if each.passed is False]
    verdict = f"outside their budget: {', '.join(failed)}" if failed else "none is outside its budget"
    show(f"Wrote {output}: {len(facts)} bundle{'s' if len(facts) > 1 else ''}, {size}; {verdict}.")
    show(f"Next: deploykit verify {' '.join(failed or bundles[:1])}")


def _told(facts: BundleFacts) -> dict[str, object]:
    """Return what JSON says of one bundle; the page has the rest."""
    shown = ("name", "passed", "device", "not_run", "levels", "worst_db", "latency_ms")
    return {name: getattr(facts, name) for name in shown}
