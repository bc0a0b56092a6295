"""Engines of a network on disk, made once for all benchmarks that time them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import torch
from _planned import DIALECTS, Network
from _side_by_side import ENGINES, stock_graph

from deploykit.arrays import FloatArray
from deploykit.backbones.weights import weights_digest
from deploykit.backends.backend import LowerOptions, resolve
from deploykit.backends.table import load_backend
from deploykit.calibration.precision import plan_precision
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.export.graphs import select
from deploykit.graph import OnnxGraph
from deploykit.optional import require
from deploykit.processor import saturates
from deploykit.spec import Fp16, Int8

PRECISIONS = ("fp32", "fp16", "int8")
TIMED, QUICK_TIMED = 48, 16
"""The default number of calibration images, and of others that engines are compared on; and that for ``--quick``."""


@dataclass(kw_only=True, eq=False)
class Engines:
    """A network, and the folder with its engines of one image, which give the logits (or the pooled features)."""

    name: str
    folder: Path
    images: int

    @cached_property
    def network(self) -> Network:
        """The backbone and its crops."""
        return Network.named(self.name, self.images, self.images)

    @cached_property
    def expected(self) -> FloatArray:
        """What torch gives at FP32 for the evaluation crops."""
        with torch.no_grad():
            parts = [self.network.backbone(torch.from_numpy(image[None])) for image in self.network.evaluated]
        return np.concatenate([np.asarray(part) for part in parts])

    @cached_property
    def _outputs(self) -> tuple[str, ...]:
        return self.network.backbone.spec.output_names

    @cached_property
    def _float_graph(self) -> OnnxGraph:
        return self.network.fused(None)

    @cached_property
    def settings(self) -> Int8:
        """INT8 as an export for this machine has it: no saturating weights where it has no VNNI."""
        return Int8(reduce_range=saturates(None))

    @cached_property
    def _planned(self) -> tuple[OnnxGraph, PrecisionPlan]:
        graph = self.network.fused(self.settings)
        return graph, self.network.plan(graph, self.settings)

    def engine(self, runtime: str, precision: str) -> Path:
        """Return the file of deploykit's engine, made where it is not there."""
        target = self.folder / f"{runtime}-{precision}"
        if not target.exists():
            published(lambda staging: self._lower(runtime, precision, staging), target)
        return target / ENGINES[runtime]

    def plain(self) -> Path:
        """Return the file of what ``torch.onnx.export`` makes of timm's model with the same weights."""
        target = self.folder / "timm.onnx"
        if not target.exists():
            published(lambda staging: onnx.save(stock_graph(self.timm(), self.network.spec.height), staging), target)
        return target

    def timm(self) -> torch.nn.Module:
        """Return timm's model of the same name with the same weights."""
        backbone = self.network.backbone
        model: torch.nn.Module = require("timm").create_model(self.name, num_classes=backbone.spec.num_classes).eval()
        model.load_state_dict(backbone.state_dict())
        return model

    def _lower(self, runtime: str, precision: str, folder: Path) -> None:
        graph, plan = self._float_graph, None
        if precision == "int8":
            graph, plan = self._planned
        elif precision == "fp16":
            plan = self._half_plan()
        rendered = DIALECTS[runtime].render(graph, plan, self.network.calibrated).graph
        folder.mkdir()
        resolve(str(load_backend(runtime).lower))(select(rendered, self._outputs), folder, LowerOptions())

    def _half_plan(self) -> PrecisionPlan:
        return plan_precision(
            self._float_graph.model,
            Fp16(),
            calibration=None,
            probe=self.network.calibrated[:4],
            weights_digest=weights_digest(self.network.backbone),
        )


def published(write: Callable[[Path], object], path: Path) -> None:
    """Let a file or folder appear only when it is whole, so that a run that was stopped goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{path.name}.part")
    if staging.is_dir():
        shutil.rmtree(staging)
    staging.unlink(missing_ok=True)
    write(staging)
    staging.rename(path)


def engines_of(name: str, work: Path, images: int) -> Engines:
    """Return a network's engines in a folder that other benchmarks may have begun; images are part of its name."""
    return Engines(name=name, folder=work / f"{name}-{images}", images=images)
