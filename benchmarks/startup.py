"""From nothing to a first result: deploykit beside the raw runtime, each start in a process of its own, in turns.

Opening includes the import of the runtime's package, which both need. Ours verifies the bundle, checks digests and
versions, and opens the engine; the raw runtime opens the same file. ``import`` is ``import deploykit`` until
`load_bundle` is there to be called, after NumPy, which both need. Memory is what the process holds after the first
result.

Bars: import under 60 ms, opening and first result at most 1.2 times the raw runtime's, memory within 10 MB of it.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from _memory import in_a_process
from _planned import crops_of
from _results import machine_line, parser, save, silence

import deploykit
from deploykit.bundle import is_bundle
from deploykit.spec import Int8

RUNTIMES = ("onnxruntime", "openvino")
WAYS = ("raw", "ours")
NETWORK = "mobilenetv3_small_100"
STARTER = str(Path(__file__).with_name("_start.py"))
IMPORT_BAR_MS, RATIO_BAR, MEMORY_BAR_MB = 60.0, 1.2, 10.0


@dataclass(frozen=True, kw_only=True)
class Start:
    """Medians over the starts of one way, in milliseconds and MB."""

    runtime: str
    way: str
    import_ms: float
    open_ms: float
    first_ms: float
    memory_mb: float

    @property
    def result_ms(self) -> float:
        """From the start of opening to the first result."""
        return self.open_ms + self.first_ms


def bundle_of(name: str, runtime: str, work: Path) -> Path:
    """The INT8 bundle of a network with random weights, made where it is not there."""
    folder = work / f"{name}-{runtime}-int8-bundle"
    if not is_bundle(folder):
        import torch
        from _from_tests import realistic

        from deploykit.backbones.base import BackboneOptions
        from deploykit.backbones.registry import build_backbone
        from deploykit.cli.demo import CALIBRATED

        torch.manual_seed(0)
        backbone = realistic(build_backbone(name, BackboneOptions())).eval()
        crops = crops_of(CALIBRATED, 16, 0, backbone.input_spec)
        precision = Int8(min_sqnr_db=-100)  # random weights have no accuracy to keep
        deploykit.export_backbone(backbone, folder, runtime=runtime, precision=precision, calibration=crops)
    return folder


def measure(runtime: str, bundle: Path, starts: int) -> list[Start]:
    """Start both ways in turns, the first pair left out: it fills the disk's cache."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(starts + 1):
        for way in WAYS:
            found[way].append(in_a_process(STARTER, [way, runtime, str(bundle)], PYTHONDONTWRITEBYTECODE=""))
    return [
        Start(
            runtime=runtime,
            way=way,
            **{
                name: statistics.median(row[name] for row in rows[1:])
                for name in ("import_ms", "open_ms", "first_ms", "memory_mb")
            },
        )
        for way, rows in found.items()
    ]


def report(rows: Sequence[Start]) -> None:
    """Print a row a way, then ours beside the bars."""
    heads = ("import ms", "open ms", "first ms", "result ms", "memory MB")
    print(f"{'runtime':<12}{'':<6}" + "".join(f"{head:>11}" for head in heads))
    for row in rows:
        figures = (row.import_ms, row.open_ms, row.first_ms, row.result_ms, row.memory_mb)
        print(f"{row.runtime:<12}{row.way:<6}" + "".join(f"{figure:11.1f}" for figure in figures))
    for runtime in dict.fromkeys(row.runtime for row in rows):
        raw, ours = (next(row for row in rows if (row.runtime, row.way) == (runtime, way)) for way in WAYS)
        print(
            f"{runtime}: import {ours.import_ms:.0f} ms (bar {IMPORT_BAR_MS:.0f}), "
            f"open to result {ours.result_ms / raw.result_ms:.2f} of raw (bar {RATIO_BAR}), "
            f"memory {ours.memory_mb - raw.memory_mb:+.1f} MB (bar {MEMORY_BAR_MB:.0f})"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both runtimes and print them beside the bars."""
    options = parser(__doc__)
    options.add_argument("--network", default=NETWORK, help="default: %(default)s")
    options.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    options.add_argument("--starts", type=int, help="of each way (default: 21; 7 with --quick)")
    options.add_argument("--work", type=Path, metavar="FOLDER", help="keep bundles here (default: a temporary folder)")
    asked = options.parse_args(arguments)
    silence()
    rows: list[Start] = []
    with tempfile.TemporaryDirectory(prefix="deploykit-startup-") as scratch:
        for runtime in asked.runtimes:
            bundle = bundle_of(asked.network, runtime, asked.work or Path(scratch))
            rows += measure(runtime, bundle, asked.starts or (7 if asked.quick else 21))
    print(machine_line())
    print(f"{asked.network} INT8, batch 1, medians of processes in turns")
    report(rows)
    save(asked.json, rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    main()
