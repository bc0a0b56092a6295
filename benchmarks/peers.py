"""Every network at every precision in ONNX Runtime and OpenVINO: deploykit beside everything else that users have.

The peers are torch eager, torch.compile (frozen weights), timm's model exported by torch.onnx.export, at FP16 that
export through ONNX Runtime's float16 converter and OpenVINO's compressed weights, and at INT8 quantize_static,
quantize_dynamic, NNCF on ONNX and on OpenVINO, and ModelOpt where it is installed. All have the same weights,
calibration crops and settings of the runtime (see `_timing.py`); where INT8 products saturate on this processor, all
that have a setting against it use it.

Engines are built first, a network for each core at a time. All routes of a network then take turns in one process, a
fresh one for each network: a graph that crashes its runtime is left out, with a line that says so, and takes no other
route with it. Beside each median stand the quartiles over the rounds, and how far the logits are from torch FP32 on
crops of other photographs. A route outside deploykit's own budget of the precision (80, 45 and 12 dB) is marked
``wrong`` and is no peer to beat; nor does ours count then.

EfficientNet-Lite0 and MobileNetV2 have trained weights, and the others random ones, drawn as training leaves them:
these show speed and rounding noise, not accuracy. Engines are kept in ``--work FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from _engines import PRECISIONS, QUICK_TIMED, TIMED, Engines, engines_of
from _peers import LEFT_OUT, NEEDED, OURS, TORCH, engine_routes, is_installed, makers, opened, torch_routes
from _planned import NETWORKS, REAL
from _results import SERIES, THEMES, check_plot, machine_line, parser, save, silence, themed, write_picture
from _timing import RUNTIMES, Call, outputs_of, turns

from deploykit.parity.metrics import sqnr_db, top1_agreement
from deploykit.spec import Fp16, Fp32, Int8
from deploykit.threads import allowed_processors, count_cores

BUDGET_DB = {"fp32": Fp32().min_sqnr_db, "fp16": Fp16().min_sqnr_db, "int8": Int8().min_sqnr_db}
QUICK_ROUNDS = 12
Key: TypeAlias = tuple[str, str, str]
"""A route of a network: precision, runtime and name."""

SHOWN_DB = 60.0
"""Routes that agree better are drawn here: such as leave convolutions in float."""

WORTH_IT = 0.95
"""What a route takes at most of FP32's time, to be what somebody would quantize for."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One route: median and quartiles of its milliseconds, dB and top-1 agreement against torch FP32.

    ``failure`` says why a route has no figures.
    """

    network: str
    precision: str
    runtime: str
    route: str
    ms: float | None = None
    quartiles: tuple[float, float] | None = None
    db: float | None = None
    top1: float | None = None
    failure: str | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether its numbers are outside the budget of its precision."""
        return self.db is not None and self.db < BUDGET_DB[self.precision]

    @property
    def counts(self) -> bool:
        """Whether it ran and is right."""
        return self.ms is not None and not self.is_wrong


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A network at a precision in a runtime: ours, the fastest peer that is right, and the closest to torch.

    ``closest`` is the peer with the most dB of those that are at least 5% faster than our FP32 engine.
    """

    network: str
    precision: str
    runtime: str
    ours: Row
    peer: Row | None
    closest: Row | None
    over_fp32: float | None

    @property
    def ratio(self) -> float | None:
        """Our time over the peer's; None where no peer is right."""
        if self.peer is None or self.peer.ms is None or self.ours.ms is None:
            return None
        return self.ours.ms / self.peer.ms


def measure(
    engines: Engines,
    precisions: Sequence[str],
    rounds: int,
    *,
    compile_too: bool,
    crashed: Collection[Key] = (),
    announce: Callable[[Key | None], None] = lambda key: None,
) -> list[Row]:
    """Open every route of a network and time all of them in turns.

    Args:
        engines: the network's.
        precisions: those to measure.
        rounds: how many are timed.
        compile_too: whether torch.compile is a route.
        crashed: routes that are left out.
        announce: told of each route before it is opened, and of None when all are.
    """
    image = engines.network.calibrated[:1]
    calls: dict[Key, Call] = {}
    rows: list[Row] = []
    groups = [(TORCH, "fp32", torch_routes(engines, compile_too=compile_too))] if "fp32" in precisions else []
    groups += [(runtime, each, engine_routes(engines, runtime, each)) for each in precisions for runtime in RUNTIMES]
    for runtime, precision, routes in groups:
        kept = {route: routes[route] for route in routes if (precision, runtime, route) not in crashed}
        for route, found in opened(kept, image, lambda route, at=(precision, runtime): announce((*at, route))):
            if isinstance(found, str):
                failed = Row(network=engines.name, precision=precision, runtime=runtime, route=route, failure=found)
                rows.append(failed)
            else:
                calls[precision, runtime, route] = found
    announce(None)
    keys = {"/".join(key): key for key in calls}
    times = turns({name: calls[key] for name, key in keys.items()}, image, rounds)
    for name, (precision, runtime, route) in keys.items():
        answers = outputs_of(calls[keys[name]], engines.network.evaluated)[-1]
        first, median, third = statistics.quantiles(times[name], n=4)
        rows.append(
            Row(
                network=engines.name,
                precision=precision,
                runtime=runtime,
                route=route,
                ms=median,
                quartiles=(first, third),
                db=min(150.0, sqnr_db(engines.expected, answers.reshape(engines.expected.shape))),
                top1=top1_agreement(engines.expected, answers) if engines.network.backbone.spec.num_classes else None,
            )
        )
    return rows


def cells_of(rows: Sequence[Row]) -> list[Cell]:
    """Put each of our engines beside the fastest right peer into its runtime; torch's routes are no runtime's."""
    exact = {(row.network, row.runtime): row.ms for row in rows if (row.precision, row.route) == ("fp32", OURS)}
    cells = []
    for ours in (row for row in rows if row.route == OURS):
        cell = (ours.network, ours.precision, ours.runtime)
        peers = [row for row in rows if (row.network, row.precision, row.runtime) == cell and row.route != OURS]
        peer = min((row for row in peers if row.counts), key=lambda row: row.ms or 0.0, default=None)
        before = exact.get((ours.network, ours.runtime))
        faster = [row for row in peers if row.ms and before and row.ms < WORTH_IT * before]
        cells.append(
            Cell(
                network=ours.network,
                precision=ours.precision,
                runtime=ours.runtime,
                ours=ours,
                peer=peer,
                closest=max(faster, key=lambda row: row.db or 0.0, default=None),
                over_fp32=before / ours.ms if before and ours.ms else None,
            )
        )
    return cells


def report(rows: Sequence[Row]) -> None:
    """Print every route, a table a network."""
    for network in dict.fromkeys(row.network for row in rows):
        print(f"\n{network} ({'trained' if network in REAL else 'random'} weights)")
        print(f"{'precision':<10}{'runtime':<12}{'route':<19}{'ms':>9}{'quartiles':>18}{'dB':>8}{'top-1':>8}")
        for row in sorted((row for row in rows if row.network == network), key=_order):
            head = f"{row.precision:<10}{row.runtime:<12}{row.route:<19}"
            if row.ms is None or row.quartiles is None:
                print(f"{head}{'-':>9}  {row.failure}")
                continue
            spread = f"{row.quartiles[0]:.2f} to {row.quartiles[1]:.2f}"
            top1 = "-" if row.top1 is None else f"{row.top1:.0%}"
            print(f"{head}{row.ms:9.2f}{spread:>18}{row.db:8.1f}{top1:>8}{'  wrong' if row.is_wrong else ''}")


def _order(row: Row) -> tuple[int, str, bool, str]:
    return PRECISIONS.index(row.precision), "" if row.runtime == TORCH else row.runtime, row.route != OURS, row.route


def summarize(rows: Sequence[Row]) -> None:
    """Print a row a cell, then the geometric means."""
    cells = cells_of(rows)
    print("\npeer: the fastest peer into the same runtime that is right; ours/peer below 1 is faster")
    print("best dB: the peer closest to torch of those at least 5% faster than FP32, right or wrong")
    heads = ("FP32/ours", "ours ms", "peer ms", "ours/peer", "ours dB", "peer dB", "best dB")
    print(f"{'network':<30}{'':<6}{'runtime':<12}" + "".join(f"{head:>10}" for head in heads) + "  peer")
    for cell in cells:
        ours, peer, ratio = cell.ours, cell.peer, cell.ratio
        gain = "-" if cell.over_fp32 is None else f"{cell.over_fp32:.2f}"
        theirs = ("-", "-", "-") if peer is None else (f"{peer.ms:.2f}", f"{ratio:.2f}", f"{peer.db:.1f}")
        best = "-" if cell.closest is None else f"{cell.closest.db:.1f}"
        figures = (gain, f"{ours.ms:.2f}", *theirs[:2], f"{ours.db:.1f}", theirs[2], best)
        note = ("none is right" if peer is None else peer.route) + ("; ours is wrong" if ours.is_wrong else "")
        head = f"{cell.network:<30}{cell.precision:<6}{cell.runtime:<12}"
        print(head + "".join(f"{each:>10}" for each in figures) + f"  {note}")
    for precision, runtime in ((precision, runtime) for precision in PRECISIONS for runtime in RUNTIMES):
        chosen = [cell for cell in cells if (cell.precision, cell.runtime) == (precision, runtime)]
        if chosen:
            gain, ratio = _mean(cell.over_fp32 for cell in chosen), _mean(cell.ratio for cell in chosen)
            print(f"{'geometric mean':<30}{precision:<6}{runtime:<12}{gain:>10}{'':>20}{ratio:>10}")


def _mean(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.geometric_mean(found):.2f}" if found else "-"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw latency against accuracy at INT8, ours and the peers; a line joins the routes of a network."""
    shown = [row for row in rows if row.precision == "int8" and row.ms is not None]
    routes = [OURS, *dict.fromkeys(row.route for row in shown if row.route != OURS)]
    exact = {(row.network, row.runtime): row.ms for row in rows if row.precision == "fp32" and row.route == OURS}
    for theme, colours in THEMES.items():
        figure = themed(theme, (9.5, 4.0), len(RUNTIMES))
        for axes, runtime in zip(figure.axes, RUNTIMES, strict=True):
            for place, route in enumerate(routes):
                own = [row for row in shown if (row.route, row.runtime) == (route, runtime)]
                figures = [(row.ms / (exact.get((row.network, runtime)) or row.ms), row.db) for row in own]
                axes.plot(
                    [x for x, _ in figures],
                    [max(-5.0, min(SHOWN_DB, y)) for _, y in figures],
                    linestyle="",
                    marker="*" if route == OURS else "osD^vPX"[(place - 1) % 7],
                    markersize=11 if route == OURS else 5,
                    color=SERIES[place % len(SERIES)],
                    label=route,
                    zorder=3 if route == OURS else 2,
                )
            axes.axvline(1.0, color=colours["ink"], linewidth=0.8, linestyle=":")
            axes.set(
                title=f"INT8 in {runtime}", xlabel="time, FP32 = 1 (left is faster)", ylabel="logits, dB (up is closer)"
            )
        handles, labels = figure.axes[-1].get_legend_handles_labels()
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False
        )
        for text in legend.get_texts():
            text.set_color(colours["ink"])
        print(f"drew {write_picture(figure, path, theme)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the networks that are asked for and print every route, then ours beside the best."""
    options = parser(__doc__, plot="latency against accuracy at INT8")
    options.add_argument("--networks", nargs="+", default=NETWORKS, help="backbones (default: the eight of the table)")
    options.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="(default: all; two with --quick)")
    options.add_argument("--rounds", type=int, help=f"timed rounds (default: 50; {QUICK_ROUNDS} with --quick)")
    options.add_argument("--images", type=int, help=f"calibration crops (default: {TIMED}; {QUICK_TIMED} with --quick)")
    options.add_argument("--no-compile", action="store_true", help="without torch.compile, which compiles for a minute")
    options.add_argument("--work", type=Path, metavar="FOLDER", help="keep engines here (default: a temporary folder)")
    options.add_argument("--here", nargs=2, metavar="PART", help=argparse.SUPPRESS)
    asked = options.parse_args(arguments)
    check_plot(options, asked.plot)
    silence()
    if asked.here:
        measure_here(json.loads(asked.here[0]), Path(asked.here[1]))
        return
    print(machine_line(), flush=True)
    with tempfile.TemporaryDirectory(prefix="deploykit-peers-") as scratch:
        rows = _all_rows(asked, asked.work or Path(scratch))
    report(rows)
    summarize(rows)
    left_out = LEFT_OUT | {
        route: f"not installed: pip install {NEEDED[route][1]}" for route in NEEDED if not is_installed(route)
    }
    print("\npeers without a row")
    for name, reason in left_out.items():
        print(f"{name:<18}{reason}")
    save(asked.json, rows=rows, left_out=left_out)
    if asked.plot:
        draw(rows, asked.plot)


def _all_rows(asked: argparse.Namespace, work: Path) -> list[Row]:
    precisions = asked.precisions or (("fp32", "int8") if asked.quick else PRECISIONS)
    rounds = asked.rounds or (QUICK_ROUNDS if asked.quick else 50)
    images = asked.images or (QUICK_TIMED if asked.quick else TIMED)
    work.mkdir(parents=True, exist_ok=True)
    job = {"work": str(work), "images": images, "rounds": rounds, "precisions": list(precisions)}
    jobs = [{**job, "name": name, "compile_too": not (asked.no_compile or asked.quick)} for name in asked.networks]
    print(f"building the engines of {', '.join(asked.networks)}", flush=True)
    with ThreadPoolExecutor(count_cores(allowed_processors())) as builders:
        list(builders.map(_build, jobs))
    rows: list[Row] = []
    for each in jobs:
        print(f"measuring {each['name']}", flush=True)
        rows += in_processes(each, work / f"{each['name']}-rows.json")
    return rows


def _build(job: dict[str, Any]) -> None:
    """Make a network's files in a process of one thread; what fails there is told where it is opened."""
    _run_here({**job, "build": True}, Path(os.devnull), OMP_NUM_THREADS="1")


def _run_here(job: dict[str, Any], results: Path, **environment: str) -> int:
    """Run this script for one network in a process; return its exit status."""
    return subprocess.run(
        [sys.executable, __file__, "--here", json.dumps(job), str(results)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        check=False,
    ).returncode


def in_processes(job: dict[str, Any], results: Path) -> list[Row]:
    """Measure a network in a process, and again without the route at which it crashed, as often as one does.

    Raises:
        SystemExit: it failed, or crashed where no peer is to blame.
    """
    crashed: dict[Key, str] = {}
    while True:
        results.unlink(missing_ok=True)
        status = _run_here({**job, "crashed": list(crashed)}, results)
        if status == 0:
            break
        at = json.loads(_progress(results).read_text()) if _progress(results).exists() else None
        if status > 0 or at is None or at[2] == OURS:
            raise SystemExit(f"{job['name']} cannot be measured: its process ended with {status}")
        crashed[tuple(at)] = f"crashes the process ({signal.Signals(-status).name})"
    rows = [Row(**{**row, "quartiles": row["quartiles"] and tuple(row["quartiles"])}) for row in read_rows(results)]
    for (precision, runtime, route), failure in crashed.items():
        rows.append(Row(network=job["name"], precision=precision, runtime=runtime, route=route, failure=failure))
    return rows


def read_rows(results: Path) -> list[dict[str, Any]]:
    """Return the rows that a process wrote."""
    found: list[dict[str, Any]] = json.loads(results.read_text())["rows"]
    return found


def _progress(results: Path) -> Path:
    return results.with_suffix(".progress")


def build_here(engines: Engines, precisions: Sequence[str]) -> None:
    """Make the files of all routes that are not there."""
    for precision, runtime in product(precisions, RUNTIMES):
        for make in makers(engines, runtime, precision).values():
            with suppress(Exception):  # it fails again where it is opened, which says why
                make()


def measure_here(job: dict[str, Any], results: Path) -> None:
    """Measure a network in this process; a file beside the results names the route that is being opened."""
    engines = engines_of(job["name"], Path(job["work"]), job["images"])
    if job.get("build"):
        build_here(engines, job["precisions"])
        return

    def announce(key: Key | None) -> None:
        _progress(results).write_text(json.dumps(key))

    rows = measure(
        engines,
        job["precisions"],
        job["rounds"],
        compile_too=job["compile_too"],
        crashed={tuple(key) for key in job["crashed"]},
        announce=announce,
    )
    save(results, rows=rows)


if __name__ == "__main__":
    main()
