"""``deploykit bench``: how fast bundles are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli.backbone_options import integers_of, one_size_of
from deploykit.cli.output import (
    DeviceOption,
    JsonFlag,
    TrustOption,
    check_plot,
    show,
    show_json,
    size_text,
    stderr_console,
    table,
)

if TYPE_CHECKING:
    from deploykit.bench import BenchResult
    from deploykit.threads import Hint

EXAMPLE = f"Example: deploykit bench resnet18-{EVALUATOR}-fp32 resnet18-{EVALUATOR}-int8 --threads 1,2"


def bench(
    bundles: Annotated[
        list[str], typer.Argument(metavar="BUNDLE...", help="Folders that `deploykit export` wrote, timed in turns.")
    ],
    *,
    batches: Annotated[
        str | None,
        typer.Option("--batch-size", metavar="N,...", help="Images a call.", show_default="what each is tuned for"),
    ] = None,
    image_size: Annotated[
        list[str] | None,
        typer.Option(
            "--image-size",
            metavar="S|HxW",
            help="Size of the images, for engines that take a range; repeatable.",
            show_default="what each is tuned for",
        ),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(
            "--threads", metavar="N,...", help="Threads to compute in.", show_default="as many as may be used"
        ),
    ] = None,
    hint: Annotated[
        str,
        typer.Option(
            "--hint",
            metavar="latency|throughput",
            help="What to open for: the shortest call, or the most images a second of several at a time.",
        ),
    ] = "latency",
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", help="How long to measure each case, at least.")
    ] = 2.0,
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="FILE", help="Draw the figures into a .png or .svg file.")
    ] = None,
    device: DeviceOption = "auto",
    trust: TrustOption = None,
    json: JsonFlag = False,
) -> None:
    """Time opening, the first result, single calls (p50, p90, p99) and a stream of calls, bundles in turns."""
    from deploykit.backends.runtime import machine
    from deploykit.bench import bench as measure

    if plot is not None:
        check_plot(plot)
    found = measure(
        bundles,
        batches=None if batches is None else integers_of(batches, "--batch-size"),
        sizes=None if not image_size else [one_size_of(text) for text in image_size],
        threads=None if threads is None else integers_of(threads, "--threads"),
        hint=cast("Hint", hint),
        seconds=seconds,
        device=device,
        trust=trust,
        progress=lambda text: stderr_console().print(f"bench: {text}", soft_wrap=True),
    )
    if plot is not None:
        from deploykit.bench_plot import plot_bench

        plot_bench(found, Path(plot))
    if json:
        show_json({"machine": machine(), "results": found})
        return
    show(_as_table(found), f"Next: deploykit verify {bundles[0]}")


def _as_table(found: list[BenchResult]) -> Any:
    columns = (
        "bundle",
        "batch",
        "image",
        "threads",
        "load ms",
        "first ms",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "images/s",
        "memory",
    )
    rows = [
        [
            each.bundle,
            str(each.batch),
            each.image,
            "all" if each.threads is None else str(each.threads),
            f"{each.load_ms:.0f}",
            f"{each.first_ms:.2f}",
            *(f"{value:.2f}" for value in (each.p50_ms, each.p90_ms, each.p99_ms)),
            f"{each.images_per_s:.0f}",
            "" if each.memory_bytes is None else size_text(each.memory_bytes),
        ]
        for each in found
    ]
    title = f"Opened for {found[0].hint}; calls one at a time, and a stream of {found[0].in_flight} in flight"
    return table(columns, rows, right=columns[1:], title=title)
