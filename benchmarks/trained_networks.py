"""Top-1 lost to INT8 on labelled images, one trained network a family: Fashion-MNIST, every runtime of the processor.

A small network of each family is trained here on a part of the 60,000 training images, then quantized by its family's
default with 256 of them, and runs on the 10,000 test images in batches of 64: as it is, and with outliers planted, some
channels of its norms 50 and 200 times as loud (`_outliers.py`). What INT8 has wrong more than torch FP32 on the same
images is the drop, with the half of its paired 95% interval.

The images are those of Debian's package dataset-fashion-mnist; --data FOLDER names another place. With --work FOLDER
weights and finished figures are kept there, and a stopped run goes on where it was.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from _fashion import FOLDER, Clothes, read_clothes
from _from_tests import keep_tables
from _narrow import register
from _outliers import with_outliers
from _results import machine_line, parser, save, silence
from _trained import BATCH, NETWORKS, Labelled, Network, labelled, trained

import deploykit
from deploykit.accuracy.evaluation import Evaluation, evaluate_models
from deploykit.arrays import FloatArray
from deploykit.errors import DeployKitError
from deploykit.spec import Int8

QUICK = ("resnetv2_narrow", "swin_narrow")
QUICK_STEPS, QUICK_IMAGES = 150, 1000
RUNTIMES = ("onnxruntime", "openvino", "torch_compile", "litert", "executorch")
CALIBRATED = 256
WEIGHTS = ("trained", "outliers")
BARS = {"trained": 0.3, "outliers": 0.5}
"""The most points of top-1 that INT8 may lose, in every runtime."""
SAME = 1e-3
"""How far the planted network's logits may be from the network's, as a share of the largest."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A network in a runtime: torch FP32's top-1 in percent, the points lost and their interval, or what went wrong.

    ``agreement`` is the percentage of images to which both give the same class.
    """

    network: str
    weights: str
    runtime: str
    fp32: float = 0.0
    points: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)
    agreement: float = 0.0
    images: int = 0
    error: str | None = None

    @property
    def met(self) -> bool:
        """Whether the drop is within the bar of these weights."""
        return self.error is None and self.points <= BARS[self.weights] + 1e-9

    @property
    def shown(self) -> str:
        """The drop and half of its interval."""
        low, high = self.interval
        return "failed" if self.error else f"{self.points:+.2f} ±{(high - low) / 2:.2f}"


def outliers(backbone: Any, images: Labelled) -> Any:
    """Return the backbone with outliers, which gives the logits that it gave."""
    planted, _ = with_outliers(backbone)
    with torch.inference_mode():
        before, after = (each(torch.from_numpy(images.images[:BATCH])) for each in (backbone, planted))
    moved = float((after - before).abs().max() / before.abs().max())
    if not moved < SAME:
        raise SystemExit(f"{backbone.spec.name}: planting outliers moved the logits by {moved:.1e} of their largest.")
    return planted


def cell_of(network: str, weights: str, runtime: str, found: Evaluation) -> Cell:
    """Return what an evaluation on labels found, in points."""
    drop = found.drop
    if drop is None or drop.points is None or drop.interval is None or found.top1 is None:
        raise SystemExit(f"{network} in {runtime}: the evaluation has no drop; it needs labels and logits.")
    return Cell(
        network=network,
        weights=weights,
        runtime=runtime,
        fp32=100 * found.top1 + drop.points,
        points=drop.points,
        interval=drop.interval,
        agreement=100 * (drop.agreement or 0.0),
        images=found.images,
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is measured, and where finished cells are kept."""

    runtimes: tuple[str, ...]
    recipe: str | None
    training: Clothes
    testing: Clothes
    images: int
    work: Path

    def rows(self, network: Network) -> list[list[Cell]]:
        """Train a network and measure it, as it is and with outliers; each row is printed as soon as it is there."""
        training = labelled(self.training, network.steps * BATCH, network.side, self.training)
        testing = labelled(self.testing, self.images, network.side, self.training)
        backbone, rows = trained(network, training, self.work), []
        for weights in WEIGHTS:
            start = time.perf_counter()
            prefix = f"{network.name}-{network.steps}-{weights}"
            cells = {runtime: self._kept(prefix, runtime) for runtime in self.runtimes}
            missing = [runtime for runtime, cell in cells.items() if cell is None]
            if missing:
                model = backbone if weights == "trained" else outliers(backbone, testing)
                for cell in self._measure(model, weights, missing, training.images[:CALIBRATED], testing):
                    cells[cell.runtime] = cell
                    self._keep(prefix, cell)
            rows.append([cell for cell in cells.values() if cell is not None])
            print(f"{line(rows[-1])}   ({time.perf_counter() - start:.0f} s)", flush=True)
        return rows

    def _measure(
        self, model: Any, weights: str, runtimes: list[str], calibration: FloatArray, testing: Labelled
    ) -> Iterator[Cell]:
        """Build the engines, and run them and torch FP32 on the test images."""
        settings = Int8() if self.recipe is None else Int8(recipe=self.recipe)
        about, engines = {"network": model.spec.name, "weights": weights}, {}
        with ExitStack() as opened:
            for runtime in runtimes:
                try:
                    engine = deploykit.create_backbone(
                        model, runtime=runtime, precision=settings, calibration=calibration, batch_size=BATCH
                    )
                except DeployKitError as error:
                    yield Cell(**about, runtime=runtime, error=str(error))
                else:
                    engines[runtime] = opened.enter_context(engine)
            if not engines:
                return
            found = evaluate_models(list(engines.values()), (testing.images, testing.labels), against=model)
        for runtime, evaluation in zip(engines, found, strict=True):
            yield cell_of(**about, runtime=runtime, found=evaluation)

    def _file(self, prefix: str, runtime: str) -> Path:
        return self.work / f"{prefix}-{runtime}-{self.recipe or 'default'}-{self.images}.json"

    def _kept(self, prefix: str, runtime: str) -> Cell | None:
        path = self._file(prefix, runtime)
        return Cell(**json.loads(path.read_text())) if path.exists() else None

    def _keep(self, prefix: str, cell: Cell) -> None:
        if cell.error is None:
            path = self._file(prefix, cell.runtime)
            path.with_suffix(".partial").write_text(json.dumps(vars(cell)))
            path.with_suffix(".partial").rename(path)


def line(row: list[Cell]) -> str:
    """Return a row of the table."""
    fp32 = next((cell.fp32 for cell in row if not cell.error), float("nan"))
    verdict = "met" if all(cell.met for cell in row) else "MISSED"
    cells = " ".join(f"{cell.shown:>13}" for cell in row)
    return f"{row[0].network:<22} {row[0].weights:<8} {fp32:6.2f} {cells}   {BARS[row[0].weights]} {verdict}"


def summary(rows: list[list[Cell]]) -> str:
    """Say which cells miss their bar, and why those failed that have no figure."""
    missed = [cell for row in rows for cell in row if not cell.met]
    if not missed:
        return f"All {sum(len(row) for row in rows)} drops are within their bars, 0.3 points and with outliers 0.5."
    named = [
        f"  {cell.network}, {cell.weights}, {cell.runtime}: {cell.error or cell.shown} (bar {BARS[cell.weights]})"
        for cell in missed
    ]
    return "\n".join([f"{len(missed)} of {sum(len(row) for row in rows)} drops are beyond their bars:", *named])


def options_of(arguments: list[str] | None) -> Namespace:
    """Return the options of the command line."""
    made = parser(__doc__)
    names = [network.name for network in NETWORKS]
    made.add_argument("--networks", nargs="+", default=None, choices=names, metavar="NAME", help="default: all")
    made.add_argument("--runtimes", nargs="+", default=RUNTIMES, choices=RUNTIMES, metavar="NAME", help="default: all")
    made.add_argument("--recipe", help="default: the family's")
    made.add_argument("--images", type=int, default=10_000, help="test images (default: %(default)s)")
    made.add_argument("--data", type=Path, default=FOLDER, metavar="FOLDER", help="(default: %(default)s)")
    made.add_argument("--work", type=Path, metavar="FOLDER", help="keeps weights and finished figures (default: none)")
    return made.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train, quantize and print two rows a network."""
    options = options_of(arguments)
    silence()
    try:
        training, testing = read_clothes(options.data)
    except DeployKitError as error:
        raise SystemExit(str(error)) from error
    register()
    chosen = options.networks or (QUICK if options.quick else [network.name for network in NETWORKS])
    networks = [network for network in NETWORKS if network.name in chosen]
    if options.quick:
        networks = [Network(**{**vars(network), "steps": QUICK_STEPS}) for network in networks]
    images = min(options.images, QUICK_IMAGES) if options.quick else options.images
    print(machine_line())
    print(
        f"points of top-1 that INT8 loses against torch FP32 (%), of {images} images, ± half of the paired 95% interval"
    )
    heads = " ".join(f"{runtime:>13}" for runtime in options.runtimes)
    print(f"{'network':<22} {'weights':<8} {'FP32':>6} {heads}   bar")
    with tempfile.TemporaryDirectory(prefix="deploykit-trained-") as scratch:
        os.environ["DEPLOYKIT_CACHE"] = f"{scratch}/cache"
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        run = Run(
            runtimes=tuple(options.runtimes),
            recipe=options.recipe,
            training=training,
            testing=testing,
            images=images,
            work=work,
        )
        with pytest.MonkeyPatch.context() as patch:
            keep_tables(patch)
            rows = [row for network in networks for row in run.rows(network)]
    print(summary(rows))
    save(options.json, cells=[cell for row in rows for cell in row])


if __name__ == "__main__":
    main()
