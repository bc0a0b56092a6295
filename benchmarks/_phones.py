"""Engines of the runtimes for phones and boards from one plan, to be timed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import torch
from _from_tests import realistic, settle
from _planned import Network
from torch import nn

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.registry import build_backbone
from deploykit.backends.backend import LowerOptions, resolve
from deploykit.backends.runtime import Runtime
from deploykit.backends.table import load_backend
from deploykit.calibration.dialect import Dialect
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.export.graphs import select
from deploykit.graph import Master
from deploykit.manifest import MANIFEST, Manifest, decode_manifest
from deploykit.spec import Int8

FP32, INT8 = "fp32", "int8"
PRECISIONS = (FP32, INT8)
RUNTIMES = ("litert", "executorch")
BESIDE = "onnxruntime"
"""Whose engine of the same plan they are timed beside."""
SETTINGS = Int8(recipe="fast")
"""Of every plan: the engines are compared with the plan, and not with other plans."""


@dataclass(kw_only=True, eq=False)
class PhoneEngines:
    """The engines of a backbone with random weights at one image size, kept in a folder; they give the logits alone.

    Norms have the statistics of the calibration images, as training leaves them.
    """

    name: str
    side: int
    folder: Path
    images: int

    @cached_property
    def network(self) -> Network:
        """The backbone, and crops for it."""
        torch.manual_seed(0)
        options = BackboneOptions(image_size=(self.side, self.side))
        backbone = realistic(build_backbone(self.name, options)).eval()
        network = Network.of(backbone, self.images, self.images)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules()):
            settle(backbone, torch.from_numpy(network.calibrated))
        return network

    def engine(self, runtime: str, precision: str) -> Path:
        """Return the folder with an engine and its manifest, which is written where it is absent.

        Raises:
            ExportError: the runtime does not take the network.
        """
        folder = self.folder / f"{runtime}-{precision}"
        if not folder.exists():
            staging = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            self._write(runtime, precision, staging)
            staging.rename(folder)
        return folder

    def opened(self, runtime: str, precision: str, *, threads: int | None = 1) -> Runtime:
        """Open an engine; without a number of threads, in as many as an engine takes by default."""
        folder = self.engine(runtime, precision)
        manifest = decode_manifest((folder / MANIFEST).read_bytes(), folder / MANIFEST)
        return load_backend(runtime).load_adapter()(manifest, folder, threads=threads)

    def _write(self, runtime: str, precision: str, folder: Path) -> None:
        master, plan = self._planned(precision)
        backend, dialect = load_backend(runtime), _dialect(runtime)
        part = dialect.keep_float(master.onnx.model, plan) if plan is not None else None
        rendered = dialect.render(master.form(backend.source), part, self.network.calibrated).graph
        graph = select(rendered, self.network.backbone.spec.output_names)
        engine = resolve(str(backend.lower))(graph, folder, LowerOptions())
        manifest = Manifest(
            backbone=self.network.backbone.spec,
            input=graph.input,
            outputs=graph.outputs,
            runtime=runtime,
            runtime_version=engine.runtime_version,
            precision=precision,
            engine=engine.file,
            requires=engine.requires,
            compiler=engine.compiler,
            weights_digest="0" * 64,
        )
        (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))

    def _planned(self, precision: str) -> tuple[Master, PrecisionPlan]:
        return self._int8 if precision == INT8 else (self._fp32, None)

    @cached_property
    def _fp32(self) -> Master:
        return self.network.master(None)

    @cached_property
    def _int8(self) -> tuple[Master, PrecisionPlan]:
        master = self.network.master(SETTINGS)
        return master, self.network.plan(master.onnx, SETTINGS)


def _dialect(runtime: str) -> Dialect:
    dialect: Dialect = resolve(str(load_backend(runtime).dialect))
    return dialect
