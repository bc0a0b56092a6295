"""INT8 on processors without VNNI: EfficientNet-Lite0 in OpenVINO, told to act as older processors.

oneDNN, OpenVINO's kernels, keeps to the instructions that ONEDNN_MAX_CPU_ISA names, so each row is a process
of its own on one machine (which must have VNNI for its first row to say something). The network has its ImageNet
weights; noise is against FP32 on crops of photographs that nothing was calibrated on. ONNX Runtime has no such
switch.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir

INSTRUCTIONS = {"all of this processor": None, "AVX-512, no VNNI": "AVX512_CORE", "AVX2": "AVX2"}
RANGES = {"whole": False, "reduced": True}
NETWORK = "tf_efficientnet_lite0"


def run_here(graph: Path, images: Path, target: Path) -> None:
    """The last features and the logits of a graph in OpenVINO, into an ``.npz``."""
    from _timing import in_openvino, outputs_of

    features, logits = outputs_of(in_openvino(ir.load(graph)), np.load(images))[-2:]
    np.savez(target, features=features, logits=logits)


def run_as(instructions: str | None, graph: Path, images: Path, target: Path) -> dict[str, np.ndarray]:
    """`run_here` in a process that uses no newer instructions."""
    environment = os.environ | ({"ONEDNN_MAX_CPU_ISA": instructions} if instructions else {})
    subprocess.run(
        [sys.executable, __file__, "--here", str(graph), str(images), str(target)], env=environment, check=True
    )
    return dict(np.load(target))


def main() -> None:
    """Print a row a set of instructions and range of weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48, help="calibration and evaluation crops (default: 48)")
    parser.add_argument("--here", type=Path, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        run_here(*options.here)
        return
    from _planned import Network
    from runtime_agreement import graphs_of

    from deploykit.parity.metrics import sqnr_db, top1_agreement
    from deploykit.spec import Int8

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    network = Network.named(NETWORK, options.images, options.images)
    with tempfile.TemporaryDirectory(prefix="deploykit-saturation-") as scratch:
        folder = Path(scratch)
        np.save(folder / "images.npy", network.evaluated)
        for name, reduced in RANGES.items():
            graphs = graphs_of(network, Int8(reduce_range=reduced))
            ir.save(graphs["openvino"], folder / f"{name}.onnx")
            ir.save(graphs["fp32"], folder / "fp32.onnx")
        reference = run_as(None, folder / "fp32.onnx", folder / "images.npy", folder / "fp32.npz")
        print(f"{'instructions':<24}{'weights':<10}{'features dB':>12}{'logits dB':>11}{'top-1':>8}  as with VNNI")
        exact: dict[str, np.ndarray] = {}
        for instructions, limit in INSTRUCTIONS.items():
            for name in RANGES:
                found = run_as(limit, folder / f"{name}.onnx", folder / "images.npy", folder / "found.npz")
                exact.setdefault(name, found["logits"])
                noise = [sqnr_db(reference[part], found[part]) for part in ("features", "logits")]
                agreement = top1_agreement(reference["logits"], found["logits"])
                same = "bit by bit" if np.array_equal(exact[name], found["logits"]) else "no"
                print(
                    f"{instructions:<24}{name:<10}{noise[0]:12.1f}{noise[1]:11.1f}{agreement:8.1%}  {same}", flush=True
                )


if __name__ == "__main__":
    main()
