"""What an export takes, stage by stage, beside doing it by hand: torch.onnx.export, then quantize_static.

Each way runs in a process of its own, with the same JPEG files to calibrate on, decoded and preprocessed by the same
code, and says of each stage its seconds and the highest resident memory in it. The export does more: it fuses, keeps a
plan that every runtime can use, proves each pass, and compares every level of the engine with torch.

Bars, for ResNet-50 with 300 images: planning (ours) at most 1.3 times the time of quantize_static, and at most 1.2
times its memory. Weights are random, drawn as training leaves them.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _memory import Stage, Stages, in_a_process
from _results import machine_line, parser, save, silence

NETWORK, IMAGES = "resnet50", 300
QUICK_IMAGES = 32
TIME_BAR, MEMORY_BAR = 1.3, 1.2
PLAN, QUANTIZE = "plan", "quantize_static"
WAYS = ("deploykit", "by hand")


def export_here(name: str, photographs: Path, folder: Path) -> list[Stage]:
    """Export INT8 for ONNX Runtime with deploykit; stages are those that its progress names."""
    stages = Stages()
    stages.begin("load")
    import torch
    from _from_tests import realistic

    from deploykit.backbones.base import BackboneOptions
    from deploykit.backbones.registry import build_backbone
    from deploykit.facade import export_backbone
    from deploykit.progress import ProgressEvent, StageStarted
    from deploykit.spec import Int8

    def heard(event: ProgressEvent) -> None:
        if isinstance(event, StageStarted):
            stages.begin(event.name)

    torch.manual_seed(0)
    backbone = realistic(build_backbone(name, BackboneOptions())).eval()
    precision = Int8(min_sqnr_db=-100)  # random weights have no accuracy to keep
    export_backbone(
        backbone, folder / "bundle", runtime="onnxruntime", precision=precision, calibration=photographs, progress=heard
    )
    stages.end()
    return list(stages.found.values())


def by_hand(name: str, photographs: Path, folder: Path) -> list[Stage]:
    """Export and quantize as the manuals of torch and ONNX Runtime say."""
    stages = Stages()
    stages.begin("load")
    import torch
    from _from_tests import realistic
    from _side_by_side import stock_graph
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    from deploykit.backbones.base import BackboneOptions
    from deploykit.backbones.registry import build_backbone
    from deploykit.images.preprocess import load_images
    from deploykit.processor import saturates

    torch.manual_seed(0)
    backbone = realistic(build_backbone(name, BackboneOptions())).eval()
    with stages.stage("torch.onnx.export"):
        import onnx

        onnx.save(stock_graph(backbone, backbone.input_spec.height, ["logits"]), folder / "fp32.onnx")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images: Iterator[Path] = iter(sorted(photographs.iterdir()))

        def get_next(self) -> Any:
            path = next(self.images, None)
            return None if path is None else {"images": load_images(path, backbone.input_spec)}

    with stages.stage(QUANTIZE), contextlib.redirect_stdout(io.StringIO()):
        quantize_static(
            folder / "fp32.onnx",
            folder / "int8.onnx",
            Reader(),
            per_channel=True,
            reduce_range=saturates(None),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return list(stages.found.values())


def measure(name: str, images: int, work: Path) -> dict[str, list[Stage]]:
    """Both ways, each in a process of its own."""
    from calibration_memory import write_photographs

    photographs = write_photographs(work / f"photographs-{images}", images, 256)
    found = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory(prefix="deploykit-pipeline-") as scratch:
            arguments = ["--here", way, name, str(photographs), scratch]
            rows = in_a_process(__file__, arguments, DEPLOYKIT_CACHE=str(Path(scratch) / "cache"))
        found[way] = [Stage(**row) for row in rows]
    return found


def ratios(found: dict[str, list[Stage]]) -> tuple[float, float]:
    """Return the time of planning over that of quantize_static, and the same of the memory."""
    ours = next(stage for stage in found["deploykit"] if stage.name == PLAN)
    theirs = next(stage for stage in found["by hand"] if stage.name == QUANTIZE)
    return ours.seconds / theirs.seconds, ours.peak_mb / theirs.peak_mb


def report(name: str, images: int, found: dict[str, list[Stage]]) -> None:
    """Print a row a stage, the sums, and the bars."""
    print(f"\n{name}, INT8 for ONNX Runtime, {images} calibration images")
    print(f"{'way':<12}{'stage':<20}{'seconds':>9}{'peak MB':>9}")
    for way, stages in found.items():
        for stage in stages:
            print(f"{way:<12}{stage.name:<20}{stage.seconds:9.1f}{stage.peak_mb:9.0f}")
        peak = max(stage.peak_mb for stage in stages)
        print(f"{way:<12}{'all':<20}{sum(stage.seconds for stage in stages):9.1f}{peak:9.0f}")
    time, memory = ratios(found)
    print(f"{PLAN} over {QUANTIZE}: time {time:.2f} (bar {TIME_BAR}), memory {memory:.2f} (bar {MEMORY_BAR})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both ways and print them stage by stage."""
    options = parser(__doc__)
    options.add_argument("--network", default=NETWORK, help="default: %(default)s")
    options.add_argument("--images", type=int, help=f"to calibrate on (default: {IMAGES}; {QUICK_IMAGES} with --quick)")
    options.add_argument("--work", type=Path, metavar="FOLDER", help="keep photographs here (default: none)")
    options.add_argument("--here", nargs=4, metavar="PART", help="measure one way in this process; used by the script")
    asked = options.parse_args(arguments)
    silence()
    if asked.here:
        way, name, photographs, folder = asked.here
        run = export_here if way == WAYS[0] else by_hand
        print(json.dumps([asdict(stage) for stage in run(name, Path(photographs), Path(folder))]))
        return
    images = asked.images or (QUICK_IMAGES if asked.quick else IMAGES)
    with tempfile.TemporaryDirectory(prefix="deploykit-pipeline-") as scratch:
        found = measure(asked.network, images, asked.work or Path(scratch))
    print(machine_line())
    report(asked.network, images, found)
    time, memory = ratios(found)
    save(
        asked.json,
        network={"name": asked.network, "images": images, "time_ratio": time, "memory_ratio": memory},
        **{way.replace(" ", "_"): stages for way, stages in found.items()},
    )


if __name__ == "__main__":
    main()
