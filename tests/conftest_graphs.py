"""A small real network, its exported graphs and its engines, each made once for all tests."""

from __future__ import annotations

import functools
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir
import torch
from filelock import FileLock
from torch import nn

from deploykit.backends.backend import Engine, LowerOptions, resolve
from deploykit.backends.runtime import Runtime
from deploykit.backends.table import load_backend
from deploykit.bundle import Manifest
from deploykit.graph import Graph, Master, OnnxGraph, TorchProgram
from deploykit.spec import BackboneSpec, BatchRange, FeatureLevel, InputSpec, TensorSpec

Made = TypeVar("Made")
SHARED = "DEPLOYKIT_TESTS_SHARED"
"""The folder where the test processes of one run keep what only one of them makes."""

SIDE = 32
LEVELS = (
    FeatureLevel(name="stem", index=0, channels=8, stride=2, receptive_field=3),
    FeatureLevel(name="stage1", index=1, channels=16, stride=4, receptive_field=7),
)
RAN_HERE = ("torch_compile", "onnxruntime", "openvino", "litert", "executorch")
SLOW_TO_BUILD = ("torch_compile", "litert", "executorch")
"""Those that compile or convert in a process of its own, for 10 seconds and more an engine."""


class TinyBackbone(nn.Module):
    """Two levels and ten logits."""

    def __init__(self, *, features_only: bool) -> None:
        super().__init__()
        self.features_only = features_only
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.stage1 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.SiLU())
        self.classifier = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stem = self.stem(images)
        stage1 = self.stage1(stem)
        if self.features_only:
            return stem, stage1
        return (self.classifier(stage1.mean((2, 3))),)


def spec_of(*, features_only: bool) -> BackboneSpec:
    return BackboneSpec(
        name="tiny",
        family="tiny",
        levels=LEVELS,
        features_only=features_only,
        num_classes=10,
        image_size=(SIDE, SIDE),
    )


@functools.cache
def network(*, features_only: bool) -> TinyBackbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = TinyBackbone(features_only=features_only)
        norm = module.stem[1]
        with torch.no_grad():
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
    return module.eval()


@functools.cache
def tiny_master(*, features_only: bool = True, dynamic: bool = True) -> Master:
    """The network in both forms; batch 1 to 8 where ``dynamic``, else 1."""
    module = network(features_only=features_only)
    names = spec_of(features_only=features_only).output_names
    example = (torch.zeros(2 if dynamic else 1, 3, SIDE, SIDE),)
    dims = ({0: torch.export.Dim("batch", min=1, max=8)},) if dynamic else None
    with warnings.catch_warnings():
        # torch.export.export copies deprecated pytree nodes of its own.
        warnings.simplefilter("ignore", category=FutureWarning)
        warnings.simplefilter("ignore", category=DeprecationWarning)
        program = torch.export.export(module, example, dynamic_shapes=dims)
        onnx_program = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=list(names), opset_version=20, verbose=False
        )
    assert onnx_program is not None
    batch = BatchRange() if dynamic else 1
    with torch.no_grad():
        shapes = [tuple(output.shape[1:]) for output in module(*example)]
    spec = InputSpec(batch=batch, height=SIDE, width=SIDE)
    outputs = tuple(
        TensorSpec(name=name, shape=("batch" if dynamic else 1, *shape))
        for name, shape in zip(names, shapes, strict=True)
    )
    return Master(
        onnx=OnnxGraph(input=spec, outputs=outputs, model=ir.from_proto(onnx_program.model_proto)),
        torch=TorchProgram(input=spec, outputs=outputs, program=program),
    )


def tiny_graph(*, features_only: bool = True, dynamic: bool = True) -> OnnxGraph:
    """The network as an ONNX graph; do not write to it."""
    return tiny_master(features_only=features_only, dynamic=dynamic).onnx


def tiny_program(*, features_only: bool = True, dynamic: bool = True) -> TorchProgram:
    """The network as a torch program; do not write to it."""
    return tiny_master(features_only=features_only, dynamic=dynamic).torch


def lower(runtime: str, graph: Graph, folder: Path) -> Engine:
    """Write the engine of a graph, in the form that the runtime lowers."""
    engine: Engine = resolve(str(load_backend(runtime).lower))(graph, folder, LowerOptions())
    return engine


def manifest_of(runtime: str, graph: Graph, engine: Engine, **changes: object) -> Manifest:
    features_only = graph.outputs[0].name in spec_of(features_only=True).output_names
    fields: dict[str, object] = {
        "backbone": spec_of(features_only=features_only),
        "input": graph.input,
        "outputs": graph.outputs,
        "runtime": runtime,
        "runtime_version": engine.runtime_version,
        "precision": "fp32",
        "engine": engine.file,
        "requires": engine.requires,
        "weights_digest": "0" * 64,
    }
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="deploykit-tests-")


def made_once(name: str, make: Callable[[Path], Made]) -> tuple[Made, Path]:
    """Let one of the test processes make something in a folder; the others take it from there."""
    folder = Path(os.environ.get(SHARED, _scratch().name)) / name
    kept = folder.with_suffix(".pickle")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not kept.exists():
            kept.write_bytes(pickle.dumps(make(folder)))
    made: Made = pickle.loads(kept.read_bytes())  # noqa: S301  (what a test process wrote)
    return made, folder


@functools.cache
def engine_of(runtime: str, *, features_only: bool = True, dynamic: bool = True) -> tuple[Manifest, Path]:
    """A manifest and the folder that holds its engine; do not write there."""

    def make(folder: Path) -> Manifest:
        graph = tiny_master(features_only=features_only, dynamic=dynamic).form(load_backend(runtime).source)
        return manifest_of(runtime, graph, lower(runtime, graph, folder))

    return made_once(f"{runtime}-{features_only}-{dynamic}", make)


def open_engine(manifest: Manifest, folder: Path, device: str = "auto", threads: int | None = None) -> Runtime:
    return load_backend(manifest.runtime).load_adapter()(manifest, folder, device=device, threads=threads)


def photographs(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, SIDE, SIDE)).astype(np.float32)


def reference(images: np.ndarray, *, features_only: bool = True) -> list[np.ndarray]:
    with torch.no_grad():
        return [output.numpy() for output in network(features_only=features_only)(torch.from_numpy(images))]


def sqnr_db(expected: np.ndarray, actual: np.ndarray) -> float:
    noise = np.square(expected.astype(np.float64) - actual).sum()
    return float(10 * np.log10(np.square(expected.astype(np.float64)).sum() / max(noise, 1e-30)))
