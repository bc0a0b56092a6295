"""How near each engine is to what the machine can do at most, and where the rest of its time goes.

The ceilings are measured first, in the same process: convolutions and products at FP32, INT8 and, where the processor
has it, BF16, through the kernels of ONNX Runtime and OpenVINO; memory; and a call with nothing to do. A network's
multiply-adds and bytes are counted from its graph. Each engine then runs in a loop of its own, and once more under its
runtime's profiler, which names every kernel. Of an engine's time

- arithmetic is what its multiply-adds would take at the ceiling of their precision,
- memory is what its tensors would take from memory beyond that, kernel by kernel, if no cache held any,
- kernels is how much longer the kernels took,
- call is what is left: waking threads, moving between kernels, the runtime's own call,
- float, a part of the above, are kernels of an INT8 engine that compute in float.

LiteRT, which has no profile of its delegate's kernels in Python, has its share alone, of the ceilings of the others.

Weights of EfficientNet-Lite0 and MobileNetV2 are trained, those of the others and of LiteRT's engines random, which
changes no time. Engines are kept in ``--work FOLDER``, where other benchmarks find them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import _ceilings
import numpy as np
import onnx
from _ceilings import Ceilings
from _engines import QUICK_TIMED, engines_of
from _layers import KINDS, layers_of, macs_by_kind
from _phones import PhoneEngines
from _planned import NETWORKS
from _profiles import Kernel, profiled
from _results import SERIES, THEMES, check_plot, machine_line, parser, save, silence, themed, write_picture
from _timing import RUNTIMES, Call

from deploykit.arrays import FloatArray

QUICK = ("mobilenetv3_large_100", "resnet50")
PRECISIONS = ("fp32", "int8")
SIDE = 224
"""The side of the images, in pixels, of LiteRT's engines; the others have the networks' own, which is the same."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The layers of one type in one engine, or all of them: milliseconds of their kernels, and what they did."""

    kind: str
    milliseconds: float
    macs: int
    bytes: int
    arithmetic_ms: float
    memory_ms: float
    float_ms: float

    @property
    def macs_per_ms(self) -> float:
        """Multiply-adds a millisecond."""
        return self.macs / self.milliseconds if self.milliseconds else 0.0


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One engine: milliseconds of a call, in a loop of its own; ``share`` is that of the ceiling.

    ``total`` and ``parts`` are of the runtime's profile; None and empty where it has none.
    """

    network: str
    runtime: str
    precision: str
    call_ms: float
    macs: int
    share: float
    total: Part | None
    parts: tuple[Part, ...]


def split(kind: str, kernels: Sequence[Kernel], ceilings: Ceilings, precision: str) -> Part:
    """Add up kernels, and what of their time arithmetic and memory explain."""
    arithmetic = memory = in_float = 0.0
    for kernel in kernels:
        layer, taken = kernel.layer, kernel.milliseconds
        needed = layer.macs / ceilings.macs_per_ms("int8" if layer.integer else "fp32")
        arithmetic += min(needed, taken)
        memory += max(0.0, min(layer.bytes / ceilings.bytes_per_ms, taken) - needed)
        in_float += taken if precision == "int8" and not layer.integer else 0.0
    return Part(
        kind=kind,
        milliseconds=sum(kernel.milliseconds for kernel in kernels),
        macs=sum(kernel.layer.macs for kernel in kernels),
        bytes=sum(kernel.layer.bytes for kernel in kernels),
        arithmetic_ms=arithmetic,
        memory_ms=memory,
        float_ms=in_float,
    )


def measure(name: str, work: Path, ceilings: Ceilings, rounds: int) -> list[Limit]:
    """Measure a network's engines, each in a loop of its own."""
    engines, found = engines_of(name, work, QUICK_TIMED), []
    image = engines.network.calibrated[:1]
    for runtime, open_graph in RUNTIMES.items():
        macs = _macs(engines.engine("onnxruntime", "fp32"))
        for precision in PRECISIONS:
            file = engines.engine(runtime, precision)
            call_ms = _loop(open_graph(file), image, rounds)
            kernels = profiled(runtime, file, image, rounds)
            kinds = {kind: [each for each in kernels if each.layer.kind == kind] for kind in KINDS}
            found.append(
                Limit(
                    network=name,
                    runtime=runtime,
                    precision=precision,
                    call_ms=call_ms,
                    macs=macs,
                    share=macs / ceilings.macs_per_ms(precision) / call_ms,
                    total=split("all", kernels, ceilings, precision),
                    parts=tuple(split(kind, each, ceilings, precision) for kind, each in kinds.items() if each),
                )
            )
    return found


def measure_litert(name: str, work: Path, ceilings: Ceilings, macs: int, rounds: int) -> list[Limit]:
    """Measure a network's LiteRT engines, with random weights, each in a loop of its own."""
    engines, found = PhoneEngines(name=name, side=SIDE, folder=work / f"{name}-{SIDE}", images=QUICK_TIMED), []
    image = np.random.default_rng(0).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    for precision in PRECISIONS:
        with engines.opened("litert", precision, threads=None) as model:
            call_ms = _loop(model._run, image, rounds)
        found.append(
            Limit(
                network=name,
                runtime="litert",
                precision=precision,
                call_ms=call_ms,
                macs=macs,
                share=macs / ceilings.macs_per_ms(precision) / call_ms,
                total=None,
                parts=(),
            )
        )
    return found


def _macs(engine: Path) -> int:
    """The multiply-adds of the fused FP32 graph, which every engine of the network has to do."""
    return sum(macs_by_kind(layers_of(onnx.load(engine))).values())


def _loop(call: Call, image: FloatArray, rounds: int) -> float:
    """The median milliseconds of calls one after the other, the first ones left out."""
    times = []
    for _ in range(rounds + rounds // 4 + 3):
        start = time.perf_counter()
        call(image)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[-rounds:])


def print_ceilings(ceilings: Ceilings) -> None:
    """Print a row a ceiling."""
    print(f"{'work':<13}{'precision':<11}{'runtime':<20}{'at most':>10}")
    for row in ceilings.rows:
        print(f"{row.work:<13}{row.precision:<11}{row.runtime:<20}{row.value:10.1f} {row.unit}")


def report(rows: Iterable[Limit]) -> None:
    """Print a row an engine; the last five columns are percent of its call."""
    heads = ("call ms", "MMACs", "GMAC/s", "ceiling")
    shares = ("arith.", "memory", "kernels", "call", "float")
    print(f"\n{'network':<29}{'runtime':<12}{'':<5}" + "".join(f"{head:>9}" for head in heads + shares))
    for row in rows:
        figures = f"{row.call_ms:9.2f}{row.macs / 1e6:9.0f}{row.macs / row.call_ms / 1e6:9.1f}{row.share:9.0%}"
        print(f"{row.network:<29}{row.runtime:<12}{row.precision:<5}{figures}{_where(row, len(shares))}")


def _where(row: Limit, columns: int) -> str:
    """Where a call's time goes; its overhead is below 0 where the profiler slowed the kernels down."""
    total = row.total
    if total is None:
        return f"{'-':>9}" * columns
    rest = total.milliseconds - total.arithmetic_ms - total.memory_ms
    parts = (total.arithmetic_ms, total.memory_ms, rest, row.call_ms - total.milliseconds, total.float_ms)
    return "".join(f"{part / row.call_ms:9.0%}" for part in parts)


def report_layers(rows: Iterable[Limit], ceilings: Ceilings) -> None:
    """Print a row a layer type of each engine."""
    heads = ("ms", "of call", "GMAC/s", "ceiling", "MACs/byte", "float ms")
    for row in (row for row in rows if row.parts):
        print(f"\n{row.network} in {row.runtime}, {row.precision}")
        print(f"{'layers':<13}" + "".join(f"{head:>10}" for head in heads))
        for part in row.parts:
            rate = f"{part.macs_per_ms / 1e6:10.1f}{part.macs_per_ms / ceilings.macs_per_ms(row.precision):10.0%}"
            intensity = f"{part.macs / part.bytes:10.1f}"
            print(
                f"{part.kind:<13}{part.milliseconds:10.3f}{part.milliseconds / row.call_ms:10.0%}"
                + (rate + intensity if part.macs else f"{'-':>10}" * 3)
                + f"{part.float_ms:10.3f}"
            )


def draw(rows: Sequence[Limit], ceilings: Ceilings, path: Path) -> None:
    """Draw the rooflines: how fast each layer type ran, by its multiply-adds for each byte that it moves."""
    markers = dict(zip(dict.fromkeys(row.network for row in rows), "osD^vPX*", strict=False))
    for theme, colours in THEMES.items():
        figure = themed(theme, (9, 3.8), len(RUNTIMES))
        for axes, runtime in zip(figure.axes, RUNTIMES, strict=True):
            for place, precision in enumerate(PRECISIONS):
                peak = ceilings.macs_per_ms(precision) / 1e6
                knee = ceilings.macs_per_ms(precision) / ceilings.bytes_per_ms
                axes.plot([0.05, knee, 2000], [0.05 * peak / knee, peak, peak], color=SERIES[place], linewidth=1.2)
                axes.annotate(
                    f"{precision} {peak:.0f}", (2000, peak * 1.1), ha="right", fontsize=8, color=colours["ink"]
                )
                for row in (row for row in rows if (row.runtime, row.precision) == (runtime, precision)):
                    shown = [part for part in row.parts if part.macs]
                    axes.plot(
                        [part.macs / part.bytes for part in shown],
                        [part.macs_per_ms / 1e6 for part in shown],
                        linestyle="",
                        marker=markers.get(row.network, "o"),
                        markersize=4.5,
                        color=SERIES[place],
                        label=row.network if precision == PRECISIONS[0] else None,
                    )
            axes.set(xscale="log", yscale="log", title=runtime, xlabel="multiply-adds a byte", ylabel="GMAC/s")
        legend = figure.axes[0].legend(fontsize=7, frameon=False, loc="lower right")
        for text in legend.get_texts():
            text.set_color(colours["ink"])
        print(f"drew {write_picture(figure, path, theme)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the ceilings and the networks that are asked for, and print where the time goes."""
    options = parser(__doc__, plot="the rooflines")
    options.add_argument("--networks", nargs="+", help="backbones (default: the eight; two with --quick)")
    options.add_argument("--rounds", type=int, help="calls that are timed (default: 100; 30 with --quick)")
    options.add_argument("--layers", action="store_true", help="print every engine's layer types too")
    options.add_argument("--work", type=Path, metavar="FOLDER", help="keep engines here (default: a temporary folder)")
    asked = options.parse_args(arguments)
    check_plot(options, asked.plot)
    silence()
    ceilings = _ceilings.measure()
    print(machine_line())
    print_ceilings(ceilings)
    rows: list[Limit] = []
    rounds = asked.rounds or (30 if asked.quick else 100)
    with tempfile.TemporaryDirectory(prefix="deploykit-limit-") as scratch:
        work = asked.work or Path(scratch)
        for name in asked.networks or (QUICK if asked.quick else NETWORKS):
            rows += measure(name, work, ceilings, rounds)
            rows += measure_litert(name, work, ceilings, rows[-1].macs, rounds)
    report(rows)
    if asked.layers or asked.quick:
        report_layers(rows if asked.layers else [row for row in rows if row.precision == "int8"], ceilings)
    save(asked.json, ceilings=ceilings.rows, rows=rows)
    if asked.plot:
        draw(rows, ceilings, asked.plot)


if __name__ == "__main__":
    main()
