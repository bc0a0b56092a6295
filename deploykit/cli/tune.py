"""``deploykit tune``: how an engine is opened best on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli.backbone_options import integers_of
from deploykit.cli.output import (
    BundleArgument,
    DeviceOption,
    JsonFlag,
    TrustOption,
    show,
    show_json,
    stderr_console,
    table,
)

if TYPE_CHECKING:
    from deploykit.tune import TuningResult

EXAMPLE = f"Example: deploykit tune resnet18-{EVALUATOR}-int8 --hint throughput"

_BOTH = "both"


def tune(
    bundle: BundleArgument,
    *,
    hint: Annotated[str, typer.Option("--hint", metavar="latency|throughput|both", help="What to tune for.")] = _BOTH,
    threads: Annotated[
        str | None, typer.Option("--threads", metavar="N,...", help="Threads to try.", show_default="powers of two")
    ] = None,
    streams: Annotated[
        str | None,
        typer.Option(
            "--streams", metavar="N,...", help="Calls that share the threads, to try.", show_default="powers of two"
        ),
    ] = None,
    in_flight: Annotated[
        str | None,
        typer.Option(
            "--in-flight", metavar="N,...", help="Runs of a stream at a time, to try.", show_default="as streams, twice"
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", help="How long to measure each candidate, at least.")
    ] = 2.0,
    forget: Annotated[bool, typer.Option("--forget", help="Forget what was measured, and measure nothing.")] = False,
    device: DeviceOption = "auto",
    trust: TrustOption = None,
    json: JsonFlag = False,
) -> None:
    """Measure threads, streams and runs in flight on this machine, and open the bundle with the best from now on.

    Only a gain that a second measurement confirms is kept. Whoever gives threads when opening it is not affected.
    """
    from deploykit.tune import forget_tuning
    from deploykit.tune import tune as measure

    if forget:
        forget_tuning(bundle, device=device)
        if json:
            show_json({"bundle": bundle, "forgotten": True})
        else:
            show(f"{bundle} opens by its defaults.")
        return
    asked: Any = ("latency", "throughput") if hint == _BOTH else (hint,)
    found = measure(
        bundle,
        hints=asked,
        threads=None if threads is None else integers_of(threads, "--threads"),
        streams=None if streams is None else integers_of(streams, "--streams"),
        in_flight=None if in_flight is None else integers_of(in_flight, "--in-flight"),
        seconds=seconds,
        device=device,
        trust=trust,
        progress=lambda text: stderr_console().print(f"tune: {text}", soft_wrap=True),
    )
    if json:
        from deploykit.backends.runtime import machine

        show_json({"machine": machine(), "results": found})
        return
    for each in found:
        show(_as_table(each), _told(each))
    show(f"Next: deploykit bench {bundle} --hint {found[-1].hint}")


def _as_table(found: TuningResult) -> Any:
    columns = ("threads", "streams", "in flight", found.unit, "times the default")
    rows = [["default", "", "", f"{found.default:.2f}", "1.00"]]
    rows += [
        [
            "all" if each.threads is None else str(each.threads),
            "" if each.streams is None else str(each.streams),
            str(each.in_flight),
            f"{each.figure:.2f}",
            f"{each.gain:.2f}",
        ]
        for each in found.trials
    ]
    title = f"{found.runtime} on {found.device} for {found.hint}, batch {found.batch}"
    return table(columns, rows, right=columns, title=title)


def _told(found: TuningResult) -> str:
    kept = found.kept
    if kept is None:
        return f"For {found.hint} the default is as good as any; nothing is kept."
    return (
        f"Kept for {found.hint}: {kept}. Measured again: {kept.default:.2f} {found.unit} by default, "
        f"{kept.best:.2f} {found.unit} so."
    )
