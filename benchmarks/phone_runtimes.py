"""Every family in the runtimes for phones and boards: what its levels keep, what runs where, and how fast.

A row is a network in a runtime and a precision, of ``tests/backends/test_phone_families.py`` with its images.
``levels`` is the SQNR in dB of every level and of the logits against the same network in double precision.
``unoptimized`` is that of the same plan in ONNX Runtime, each node as it is written, and ``behind`` by how many dB the
worst level is behind it. ``coverage`` says what the runtime's delegate computes. Weights are random.

``--speed`` prints times instead: the engines of a network take turns in one process with one thread. ``ratio`` is the
median over the turns of INT8's time to FP32's, ``of ORT`` that of its time to ONNX Runtime's of the same plan.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import _from_tests  # noqa: F401  (finds the tests)
import pytest
from _phones import BESIDE, FP32, INT8, PRECISIONS, RUNTIMES, PhoneEngines
from _planned import node_by_node
from _results import machine_line, parser, save, silence
from _timing import turns

from deploykit.arrays import FloatArray
from deploykit.backends.backend import resolve
from deploykit.backends.table import load_backend
from deploykit.errors import DeployKitError
from deploykit.parity.metrics import sqnr_db
from tests.backbones.smallest import SMALLEST
from tests.backends.integer_engine import integer_engine, same_plan
from tests.backends.phone_families import SIDE, family_case, float_engine
from tests.calibration.conftest import Case
from tests.conftest_graphs import SHARED
from tests.photographs import write_photographs
from tests.torch_tables import keep_tables

QUICK = ("mobilenetv3_small_075", "vit_tiny_patch16_224")
SPEED_SIDE = 224
"""The side of the images that engines are timed with, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A network in a runtime and a precision; ``refused`` is the error where it does not convert."""

    network: str
    side: int
    runtime: str
    precision: str
    levels: list[float]
    unoptimized: list[float]
    coverage: dict[str, int]
    refused: str = ""

    @property
    def behind(self) -> float:
        """By how many dB the worst level is behind the same plan in ONNX Runtime."""
        return max(other - own for own, other in zip(self.levels, self.unoptimized, strict=True))


@dataclass(frozen=True, kw_only=True)
class Times:
    """Medians in ms of a network in a runtime, and of the same plan in ONNX Runtime; medians of the turns' ratios."""

    network: str
    side: int
    runtime: str
    rounds: int
    fp32_ms: float
    int8_ms: float
    beside_ms: float
    ratio: float
    of_beside: float


def compare(case: Case, name: str, runtime: str, precision: str) -> Row:
    """Compare an engine's levels with double precision, and with those of the same plan in ONNX Runtime."""
    of = {"network": name, "side": SIDE, "runtime": runtime, "precision": precision}
    try:
        if precision == INT8:
            engine = integer_engine(runtime, case, name)
            file, found, others = engine.file, engine.outputs, same_plan(engine)
        else:
            file, found = float_engine(runtime, case, name)
            others = node_by_node(case.graph.model, case.images)
    except DeployKitError as error:
        return Row(**of, levels=[], unoptimized=[], coverage={}, refused=str(error))
    expected, coverage = case.exact(), resolve(str(load_backend(runtime).inspect))(file)
    return Row(**of, levels=_db(expected, found), unoptimized=_db(expected, others), coverage=coverage)


def measure(engines: PhoneEngines, runtime: str, rounds: int) -> Times:
    """Let the two engines of a runtime and ONNX Runtime's in integers take turns."""
    models = {precision: engines.opened(runtime, precision) for precision in PRECISIONS}
    models[BESIDE] = engines.opened(BESIDE, INT8)
    try:
        image = engines.network.calibrated[:1]
        found = turns({precision: model._run for precision, model in models.items()}, image, rounds)
    finally:
        for model in models.values():
            model.close()
    return Times(
        network=engines.name,
        side=engines.side,
        runtime=runtime,
        rounds=rounds,
        fp32_ms=statistics.median(found[FP32]),
        int8_ms=statistics.median(found[INT8]),
        beside_ms=statistics.median(found[BESIDE]),
        ratio=_ratio(found[INT8], found[FP32]),
        of_beside=_ratio(found[INT8], found[BESIDE]),
    )


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def _db(expected: Sequence[FloatArray], found: Sequence[FloatArray]) -> list[float]:
    return [round(float(sqnr_db(one, two)), 2) for one, two in zip(expected, found, strict=True)]


def line(row: Row) -> str:
    """Return a row of the table."""
    head = f"{row.network:<28}{row.side:>3}  {row.runtime:<11}{row.precision:<5}"
    if row.refused:
        return f"{head} refused: {row.refused}"
    levels, others = (" ".join(f"{value:.1f}" for value in values) for values in (row.levels, row.unoptimized))
    coverage = ", ".join(f"{count} {name}" for name, count in row.coverage.items()) or "all in integers"
    return f"{head} {levels} | {others} | {row.behind:.2f} | {coverage}"


def time_line(times: Times) -> str:
    """Return a row of the table of times."""
    values = f"{times.fp32_ms:9.2f}{times.int8_ms:9.2f}{times.ratio:8.3f}{times.beside_ms:9.2f}{times.of_beside:8.3f}"
    return f"{times.network:<28}{times.side:>3}  {times.runtime:<11}{values}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the networks that are asked for."""
    options = parser(__doc__)
    options.add_argument("--networks", nargs="+", metavar="NAME", help="backbones (default: one of each family)")
    options.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES, help="(default: both)")
    options.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="(default: both)")
    options.add_argument("--speed", action="store_true", help="print times")
    options.add_argument("--side", type=int, default=SPEED_SIDE, help="pixels, with --speed (default: %(default)s)")
    options.add_argument("--images", type=int, default=24, help="crops to calibrate on, with --speed (%(default)s)")
    options.add_argument("--rounds", type=int, help="timed rounds (default: 40; 15 with --quick)")
    options.add_argument("--work", type=Path, metavar="FOLDER", help="keep engines here (default: a temporary folder)")
    asked = options.parse_args(arguments)
    silence()
    networks = asked.networks or (QUICK if asked.quick else SMALLEST)
    with tempfile.TemporaryDirectory(prefix="deploykit-phones-") as scratch:
        work = (asked.work or Path(scratch)).absolute()
        if asked.speed:
            print(f"{machine_line()}\nrandom weights, one thread")
            heads = f"{'FP32 ms':>9}{'INT8 ms':>9}{'ratio':>8}{'ORT ms':>9}{'of ORT':>8}"
            print(f"{'network':<28}side {'runtime':<11}{heads}")
            rows: Sequence[Row | Times] = _times(networks, asked.runtimes, work, asked)
        else:
            print(f"{machine_line()}\nrandom weights; calibrated and compared on the same crops of six photographs")
            rows = _compared(networks, asked.runtimes, asked.precisions, work)
    save(asked.json, rows=rows)


def _compared(networks: Sequence[str], runtimes: Sequence[str], precisions: Sequence[str], work: Path) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv(SHARED, str(work))
        keep_tables(patch)
        photographs = write_photographs(Path(scratch))
        for name in networks:
            case = family_case(name, photographs)
            for runtime in runtimes:
                for precision in precisions:
                    rows.append(compare(case, name, runtime, precision))
                    print(line(rows[-1]), flush=True)
    return rows


def _times(networks: Sequence[str], runtimes: Sequence[str], work: Path, asked: argparse.Namespace) -> list[Times]:
    rows = []
    for name in networks:
        folder = work / f"{name}-{asked.side}"
        engines = PhoneEngines(name=name, side=asked.side, folder=folder, images=asked.images)
        for runtime in runtimes:
            rows.append(measure(engines, runtime, asked.rounds or (15 if asked.quick else 40)))
            print(time_line(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
