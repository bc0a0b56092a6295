"""``deploykit compare``: what does a new bundle change, and is that within the tolerances?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.changes.tolerances import CONTRACT, DROP_DB, Tolerances
from deploykit.cli.exit_codes import DRIFT
from deploykit.cli.output import (
    DeviceOption,
    JsonFlag,
    ThreadsOption,
    TrustOption,
    json_text,
    show,
    show_json,
    size_text,
    table,
)
from deploykit.cli.run import find_given
from deploykit.output_places import check_result_file
from deploykit.parity.report import decibels
from deploykit.places import write_whole

if TYPE_CHECKING:
    from rich.table import Table

    from deploykit.changes.comparison import BundleComparison
    from deploykit.changes.differences import Difference
    from deploykit.changes.rows import LevelChange, Measure

EXAMPLE = f"Example: deploykit compare release/resnet18-{EVALUATOR}-int8 resnet18-{EVALUATOR}-int8"


def compare(
    old: Annotated[str, typer.Argument(metavar="OLD", help="The last release's bundle.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The bundle that may replace it.")],
    *,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--images", metavar="PATH", help="Image file or folder to run both on; repeatable. [default: the bundle's]"
        ),
    ] = None,
    max_drop_db: Annotated[
        float | None,
        typer.Option(
            "--max-drop-db",
            metavar="DB",
            help="How much farther from torch a level may be.",
            show_default=f"{DROP_DB:g} for equal precisions, else the new bundle's own budget",
        ),
    ] = None,
    min_sqnr_db: Annotated[
        float | None,
        typer.Option(
            "--min-sqnr-db",
            metavar="DB",
            help="How near the new outputs must be to the old ones.",
            show_default="by precision, plan and runtime",
        ),
    ] = None,
    min_top1_agreement: Annotated[
        float | None,
        typer.Option(
            "--min-top1-agreement", metavar="SHARE", help="On how many images both must name one class, 0 to 1."
        ),
    ] = None,
    max_slowdown: Annotated[
        float | None, typer.Option("--max-slowdown", metavar="RATIO", help="New latency over old, such as 1.1.")
    ] = None,
    max_growth: Annotated[
        float | None, typer.Option("--max-growth", metavar="RATIO", help="New size over old, such as 1.1.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", metavar="|".join(CONTRACT), help="What may change; repeatable."),
    ] = None,
    run: Annotated[
        bool,
        typer.Option(
            "--run/--no-run", help="Run both engines here, or compare only what the bundles say of themselves."
        ),
    ] = True,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    trust: TrustOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.json", help="Also write what --json prints to a file."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Compare two bundles: levels, labels, preprocessing, plan, tools, numbers, latency and size.

    Needs no torch and no weights. Exit code 0: every change is within the tolerances; 1: not.
    """
    from deploykit.changes.comparison import compare_bundles

    if output is not None:
        check_result_file(output, "comparison")
    tolerances = Tolerances(
        max_drop_db=max_drop_db,
        min_sqnr_db=min_sqnr_db,
        min_top1_agreement=min_top1_agreement,
        max_slowdown=max_slowdown,
        max_growth=max_growth,
        allow=tuple(allow or ()),
    )
    files = find_given(images).files if images else None
    found = compare_bundles(
        old, new, images=files, tolerances=tolerances, run=run, device=device, threads=threads, trust=trust
    )
    told = {"passed": found.passed, "comparison": found}
    if output is not None:
        write_whole(output, json_text(told), what="comparison")
    if json:
        show_json(told)
    else:
        _show(found)
    if not found.passed:
        raise typer.Exit(DRIFT)


def _show(found: BundleComparison) -> None:
    for title, differences in (("What an application notices", found.contract), ("How they were made", found.making)):
        if differences:
            show(_differences(title, differences), "")
    show(_levels(found), "", _measures(found.measures), "")
    show(*(f"note: {note}." for note in found.notes))
    if found.passed:
        show(f"{found.new} can replace {found.old}.", f"Next: deploykit verify {found.new}")
    else:
        show(
            f"{found.new} is OUTSIDE the tolerances:",
            *(f"  {failure}" for failure in found.failures),
            f"Next: deploykit inspect {Path(found.new)}, or allow what was meant to change.",
        )


def _differences(title: str, differences: tuple[Difference, ...]) -> Table:
    rows = [[each.what, each.old, each.new] for each in differences]
    return table(("what", "old", "new"), rows, title=title)


def _levels(found: BundleComparison) -> Table:
    agreement = any(level.agreement for level in found.levels)
    columns = ["level", "old dB", "new dB", "change", "new to old dB"]
    columns += ["same class (95%)"] if agreement else []
    rows = [_level_row(level, agreement=agreement) for level in found.levels]
    where = f"{found.images} images here" if found.images else "as stored in the bundles"
    title = f"SQNR against torch fp32 ({where})"
    return table([*columns, "measured", "result"], rows, right=columns[1:], title=title)


def _level_row(level: LevelChange, *, agreement: bool) -> list[str]:
    drop = level.drop_db
    row = [level.name, decibels(level.old_db), decibels(level.new_db)]
    row += ["" if drop is None else f"{round(-drop, 1) + 0.0:+.1f}", decibels(level.between_db)]
    row += ([str(level.agreement) if level.agreement else ""]) if agreement else []
    return [*row, level.measured, "FAIL" if level.failures else "pass"]


def _measures(measures: tuple[Measure, ...]) -> Table:
    rows = []
    for each in measures:
        texts = [size_text(value) if each.unit == "B" else f"{value:.2f} {each.unit}" for value in (each.old, each.new)]
        limit = "" if each.limit is None else f"{each.limit:g}"
        rows.append([each.name, *texts, f"{each.ratio:.2f}", limit, "pass" if each.passed else "FAIL"])
    return table(
        ("measure", "old", "new", "ratio", "allowed", "result"), rows, right=("old", "new", "ratio", "allowed")
    )
