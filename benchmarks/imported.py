"""Models that NNCF quantized, imported, beside the same model as it comes and beside our own plan: time and parity.

MobileNetV2 and EfficientNet-Lite0 with their real weights. NNCF's ONNX graph is timed as it comes; imported, its plan
is rendered in each runtime's dialect; ours is the plan of the family's recipe from the same crops. All take turns; the
figure is the time of the imported engine over that of ours, whose bar is 1.05. SQNR is against torch FP32, on crops of
other photographs.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from _planned import DIALECTS, REAL, Network
from _results import machine_line, parser, save, silence
from _stock import nncf_route
from _timing import RUNTIMES, outputs_of, turns

from deploykit.export.graphs import select
from deploykit.export.import_quantized import import_quantized
from deploykit.parity.metrics import sqnr_db
from deploykit.processor import saturates
from deploykit.spec import Int8

BAR = 1.05
AS_IT_COMES, IMPORTED, OURS = "as it comes", "imported", "ours"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A network in a runtime: milliseconds and dB of each way."""

    network: str
    runtime: str
    milliseconds: dict[str, float]
    decibels: dict[str, float]

    @property
    def ratio(self) -> float:
        """The time of the imported engine over that of ours."""
        return self.milliseconds[IMPORTED] / self.milliseconds[OURS]


def measure(name: str, runtimes: list[str], images: int, rounds: int, folder: Path) -> list[Row]:
    """Quantize by both, and time all engines of a network."""
    network = Network.named(name, images, images)
    head = network.backbone.spec.output_names
    plain = select(network.fused(None), head)
    path = folder / f"{name}.onnx"
    with contextlib.redirect_stdout(io.StringIO()):  # NNCF's bars of progress
        quantized = nncf_route(ir.to_proto(plain.model), network.calibrated)
    onnx.save(quantized, path)
    found = import_quantized(path)
    settings = Int8(reduce_range=saturates(None))
    graph = network.fused(settings)
    plan, rows = network.plan(graph, settings), []
    for runtime in runtimes:
        dialect, opened = DIALECTS[runtime], RUNTIMES[runtime]
        taken = dialect.keep_float(found.master.model, found.plan)
        own = select(dialect.render(graph, plan, network.calibrated).graph, head)
        calls = {
            AS_IT_COMES: opened(path),
            IMPORTED: opened(dialect.render(found.master, taken, network.calibrated).graph.model),
            OURS: opened(own.model),
        }
        times = turns(calls, network.evaluated[:1], rounds)
        rows.append(
            Row(
                network=name,
                runtime=runtime,
                milliseconds={way: statistics.median(each) for way, each in times.items()},
                decibels={
                    way: sqnr_db(network.expected[-1], outputs_of(call, network.evaluated)[-1])
                    for way, call in calls.items()
                },
            )
        )
    return rows


def main() -> None:
    """Print a row a network and runtime."""
    made = parser(__doc__)
    made.add_argument("--networks", nargs="+", default=list(REAL), choices=REAL, metavar="NAME", help="default: both")
    made.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES), metavar="NAME")
    made.add_argument("--images", type=int, default=48, help="crops of each kind (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=60, help="turns (default: %(default)s)")
    options = made.parse_args()
    silence()
    images, rounds = (8, 10) if options.quick else (options.images, options.rounds)
    print(machine_line())
    print(
        f"{'network':<24}{'runtime':<13}" + "".join(f"{way:>20}" for way in (AS_IT_COMES, IMPORTED, OURS)) + "   ratio"
    )
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="deploykit-imported-") as scratch:
        for name in options.networks:
            for row in measure(name, options.runtimes, images, rounds, Path(scratch)):
                cells = "".join(
                    f"{milliseconds:>9.2f} ms{row.decibels[way]:>6.1f} dB"
                    for way, milliseconds in row.milliseconds.items()
                )
                verdict = "" if row.ratio <= BAR else f"  beyond the bar, {BAR}"
                print(f"{row.network:<24}{row.runtime:<13}{cells}{row.ratio:>8.3f}{verdict}", flush=True)
                rows.append(row)
    save(options.json, rows=[asdict(row) | {"ratio": row.ratio} for row in rows])


if __name__ == "__main__":
    main()
