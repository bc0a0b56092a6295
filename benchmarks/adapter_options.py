"""What each option that an adapter sets is good for: an engine with it and without it, in turns.

``with`` is the engine as deploykit opens it, ``without`` the same file with that one option left to the runtime's
default. ``ratio`` is the median over the turns of the time with it to that without. Rows of

- ``alone`` call one engine;
- ``in turn`` call it and an FP32 engine of the same network, opened in the same way, whose threads may still be busy
  when the next is called: milliseconds of both;
- ``two processes`` run the same engine in one thread each at the same time: milliseconds for a frame of either;
- ``one thread`` compare all threads, ``without``, with ``threads=1``, ``with``: small maps may be faster in one, which
  ``deploykit tune`` finds out and remembers.

An option that changes numbers has the SQNR in dB against torch too. `benchmarks/streams.py` has those of
``hint="throughput"``. Options of GPUs, and the format that a session may read, which is there for safety, have no row.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

from _engines import QUICK_TIMED, Engines, engines_of
from _phones import PhoneEngines
from _results import machine_line, parser, save, silence
from _timing import Call, in_onnxruntime, in_openvino, outputs_of, turns

from deploykit.arrays import FloatArray
from deploykit.backends.onnxruntime.session import KEEP_FLOAT_WEIGHTS, STOP_SPINNING
from deploykit.parity.metrics import sqnr_db

NETWORKS = ("tf_efficientnet_lite0", "resnet50")
SMALL, SIDE = "mobilenetv3_small_100", 64
"""The network whose threads are compared, and its images' side in pixels."""
THREADED = ("onnxruntime", "openvino", "litert")
PRECISIONS = ("fp32", "int8")
OPEN_S, FRAMES_S = 120.0, 3.0
"""How long one of two processes waits for the other at most, and for how long they run."""
REST_S = 0.1
"""Before each turn: longer than threads spin, which would take the other engine's cores."""
WITH, WITHOUT = "with", "without"


@dataclass(frozen=True, kw_only=True)
class Row:
    """An option on an engine: median milliseconds, the median of the turns' ratios, and dB where numbers change."""

    option: str
    runtime: str
    network: str
    precision: str
    how: str
    with_ms: float
    without_ms: float
    ratio: float
    with_db: float | None = None
    without_db: float | None = None


@dataclass(frozen=True, kw_only=True)
class Option:
    """A runtime's setting: its name here, its key there, and the precisions that it matters to."""

    name: str
    runtime: str
    key: str
    precisions: tuple[str, ...] = PRECISIONS
    beside: bool = False
    numbers: bool = False


OPTIONS = (
    Option(name="threads that sleep", runtime="onnxruntime", key=STOP_SPINNING[0], beside=True),
    Option(
        name="float layers kept", runtime="onnxruntime", key=KEEP_FLOAT_WEIGHTS[0], precisions=("int8",), numbers=True
    ),
    Option(name="hint of latency", runtime="openvino", key="PERFORMANCE_HINT", beside=True),
    Option(name="pinned precision", runtime="openvino", key="INFERENCE_PRECISION_HINT", numbers=True),
)
OPENED: dict[str, Callable[..., Call]] = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def measure(engines: Engines, option: Option, rounds: int) -> list[Row]:
    """Compare an option on a network's engines."""
    rows, of = [], {"option": option.name, "runtime": option.runtime, "network": engines.name}
    for precision in option.precisions:
        calls = _both_ways(engines, option, precision)
        kept = {f"{way}_db": _db(engines, call) for way, call in calls.items()} if option.numbers else {}
        hows = {"alone": calls}
        if option.beside:
            others = _both_ways(engines, option, "fp32")
            hows["in turn"] = {way: _both(others[way], call) for way, call in calls.items()}
        for how, timed in hows.items():
            times = turns(timed, engines.network.calibrated[:1], rounds, pause_s=REST_S)
            rows.append(Row(**of, precision=precision, how=how, **_figures(times), **kept))
    return rows


def _both_ways(engines: Engines, option: Option, precision: str) -> dict[str, Call]:
    file, opened = engines.engine(option.runtime, precision), OPENED[option.runtime]
    return {WITH: opened(file), WITHOUT: opened(file, without=option.key)}


def _db(engines: Engines, call: Call) -> float:
    return float(sqnr_db(engines.expected, outputs_of(call, engines.network.evaluated)[0]))


def _both(one: Call, other: Call) -> Call:
    return lambda images: one(images) + other(images)


def measure_threads(engines: PhoneEngines, runtime: str, rounds: int) -> list[Row]:
    """Compare one thread with all of them, on small images."""
    rows, image = [], engines.network.calibrated[:1]
    of = {"option": "one thread", "runtime": runtime, "network": f"{engines.name} {SIDE}", "how": "alone"}
    for precision in PRECISIONS:
        with ExitStack() as stack:
            opened = {
                way: stack.enter_context(engines.opened(runtime, precision, threads=threads))
                for way, threads in ((WITH, 1), (WITHOUT, None))
            }
            times = turns({way: model._run for way, model in opened.items()}, image, rounds)
        rows.append(Row(**of, precision=precision, **_figures(times)))
    return rows


def measure_processes(engines: Engines, rounds: int) -> list[Row]:
    """Compare engines of one thread in two processes, tied to processors and not."""
    rows, of = [], {"option": "threads not pinned", "runtime": "openvino", "network": engines.name}
    for precision in PRECISIONS:
        file = engines.engine("openvino", precision)
        times: dict[str, list[float]] = {WITH: [], WITHOUT: []}
        for _ in range(rounds):
            for way, pinned in ((WITH, False), (WITHOUT, True)):
                times[way].append(_in_two_processes(file, engines.network.calibrated[:1], pinned=pinned))
        rows.append(Row(**of, precision=precision, how="two processes", **_figures(times)))
    return rows


def _in_two_processes(file: Path, image: FloatArray, *, pinned: bool) -> float:
    """Milliseconds of a frame where two processes compute at the same time."""
    context = multiprocessing.get_context("spawn")
    start, counts = context.Barrier(2), context.SimpleQueue()
    processes = [context.Process(target=_count, args=(file, image, pinned, start, counts)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"one of two processes ended with {process.exitcode} before it had counted its frames.")
    return 1000 * FRAMES_S / statistics.mean(counts.get() for _ in processes)


def _count(file: Path, image: FloatArray, pinned: bool, start: Barrier, counts: SimpleQueue[int]) -> None:
    """Count frames from when both processes are ready."""
    call = in_openvino(file, threads=1, pinned=pinned)
    call(image)
    start.wait(OPEN_S)
    end, count = time.time() + FRAMES_S, 0
    while time.time() < end:
        call(image)
        count += 1
    counts.put(count)


def _figures(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {
        "with_ms": statistics.median(times[WITH]),
        "without_ms": statistics.median(times[WITHOUT]),
        "ratio": statistics.median(one / other for one, other in zip(times[WITH], times[WITHOUT], strict=True)),
    }


def line(row: Row) -> str:
    """Return a row of the table."""
    head = f"{row.option:<20}{row.runtime:<12}{row.network:<25}{row.precision:<6}{row.how:<14}"
    db = "" if row.with_db is None else f"{row.with_db:9.1f}{row.without_db:11.1f}"
    return f"{head}{row.with_ms:9.3f}{row.without_ms:11.3f}{row.ratio:8.3f}{db}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every option."""
    options = parser(__doc__)
    options.add_argument("--networks", nargs="+", metavar="NAME", default=NETWORKS, help="(default: %(default)s)")
    options.add_argument("--rounds", type=int, help="timed rounds (default: 100; 20 with --quick)")
    options.add_argument("--work", type=Path, metavar="FOLDER", help="keep engines here (default: a temporary folder)")
    asked = options.parse_args(arguments)
    silence()
    rounds = asked.rounds or (20 if asked.quick else 100)
    print(machine_line())
    heads = f"{'with ms':>9}{'without ms':>11}{'ratio':>8}{'with dB':>9}{'without dB':>11}"
    print(f"{'option':<20}{'runtime':<12}{'network':<25}{'':<6}{'how':<14}{heads}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="deploykit-options-") as scratch:
        work = (asked.work or Path(scratch)).absolute()
        for name in asked.networks:
            engines = engines_of(name, work, QUICK_TIMED)
            for option in OPTIONS:
                rows += _printed(measure(engines, option, rounds))
            rows += _printed(measure_processes(engines, max(1, rounds // 20)))
        small = PhoneEngines(name=SMALL, side=SIDE, folder=work / f"{SMALL}-{SIDE}", images=QUICK_TIMED)
        for runtime in THREADED:
            rows += _printed(measure_threads(small, runtime, rounds))
    save(asked.json, rows=rows)


def _printed(rows: list[Row]) -> list[Row]:
    for row in rows:
        print(line(row), flush=True)
    return rows


if __name__ == "__main__":
    main()
