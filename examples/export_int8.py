"""Calibrate on a folder of photographs, export an INT8 engine, and print how far each level is from torch FP32.

Example: python examples/export_int8.py photos/ --pretrained --output lite0-int8
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from deploykit import Int8, export_backbone
from deploykit.progress import ProgressEvent, StageStarted


def show_stage(event: ProgressEvent) -> None:
    """Print the name of each stage; the other events are finer steps."""
    if isinstance(event, StageStarted):
        print(f"... {event.name}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, then print one line per level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of images like those that the model will see")
    parser.add_argument("--backbone", default="efficientnet_lite0", help="default: %(default)s")
    parser.add_argument("--pretrained", action="store_true", help="load the default weights instead of random ones")
    parser.add_argument("--image-size", type=int, help="pixels (default: the size of the weights)")
    parser.add_argument("--runtime", default="onnxruntime", help="default: %(default)s")
    parser.add_argument("--min-sqnr-db", type=float, default=Int8().min_sqnr_db, help="default: %(default)s dB")
    parser.add_argument("--output", type=Path, default=Path("int8-bundle"), help="default: %(default)s")
    options = parser.parse_args(arguments)

    result = export_backbone(
        options.backbone,
        options.output,
        runtime=options.runtime,
        precision=Int8(min_sqnr_db=options.min_sqnr_db),
        calibration=options.photos,
        pretrained=options.pretrained,
        image_size=options.image_size,
        progress=show_stage,
    )
    for level in result.parity.levels:
        print(f"{level.name:<8} {level.sqnr_db:6.1f} dB, cosine {level.cosine:.4f}")
    print(f"{options.output}: {result.status}")


if __name__ == "__main__":
    main()
