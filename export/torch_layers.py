"""Walk the layers of a bundle's engine beside the torch network that it was exported from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploykit.arrays import Array, FloatArray, ImageArray
from deploykit.backbones.base import BaseBackbone
from deploykit.backbones.build import build_any
from deploykit.backbones.registry import is_known
from deploykit.backbones.request import BackboneRequest, Pretrained
from deploykit.backbones.weights import weights_digest
from deploykit.bundle import open_bundle
from deploykit.errors import SpecError, WeightsError
from deploykit.export.bundle_layers import EQUALIZED, engine_graph, modules_of_plan
from deploykit.export.layer_outputs import wrong_outputs
from deploykit.export.layer_walk import Walk, typed
from deploykit.export.layers import LayerReport, layer_errors, reproduce, shared_tensors, with_outputs
from deploykit.export.program_values import ProgramValues
from deploykit.export.trace import output_names, trace
from deploykit.fusion.locate import module_of
from deploykit.fusion.pipeline import fuse
from deploykit.graph import TorchProgram
from deploykit.images.preprocess import network_images
from deploykit.manifest import Manifest
from deploykit.names import TIMM
from deploykit.onnx_session import graph_batch
from deploykit.spec import BATCH_DIM, Int8, TensorSpec, parse_precision

if TYPE_CHECKING:
    from torch import nn


def torch_layers(
    folder: Path,
    network: nn.Module | None = None,
    *,
    pretrained: Pretrained = False,
    checkpoint_key: str | None = None,
    reproducer: Path | None = None,
) -> LayerReport:
    """Return each layer's own error against torch in FP32 and the whole network's, on the bundle's images.

    The network is traced and fused again as the export did it, so that its tensors and the engine's correspond; fusing
    proves each of its passes. Every layer is named by its module.

    Args:
        folder: the bundle.
        network: the network that was exported; None: the backbone that the manifest names.
        pretrained: its weights: a checkpoint file, a tag, or True for the default ones.
        checkpoint_key: which of several state dicts in the file.
        reproducer: where to write a culprit alone, see `deploykit.export.layers.compare_layers`.

    Raises:
        SpecError: the engine is no ONNX graph, its network cannot be made from the manifest or is another, or its
            channels were scaled against each other before it was quantized.
        WeightsError: the weights are not those that were exported.
        BundleError: the bundle is damaged.
    """
    start = time.perf_counter()
    manifest = open_bundle(folder)
    model, images = engine_graph(folder, manifest)
    _check_not_equalized(manifest)
    backbone = build_network(manifest, network, pretrained=pretrained, checkpoint_key=checkpoint_key)
    program = ProgramValues(_program(backbone, manifest, images))
    report = compare_with_torch(
        typed(model),
        _TorchNetwork(program, manifest, images, graph_batch(model)),
        min_own_db=_gate(manifest),
        modules=modules_of_plan(folder, manifest),
        reproducer=reproducer,
    )
    return replace(report, seconds=round(time.perf_counter() - start, 2))


def build_network(
    manifest: Manifest,
    network: nn.Module | None = None,
    *,
    pretrained: Pretrained = False,
    checkpoint_key: str | None = None,
) -> BaseBackbone:
    """Return the torch network of a bundle, with the very weights that were exported.

    Raises:
        SpecError: it cannot be made from the manifest, or is another one.
        WeightsError: the weights are other ones, or cannot be had.
    """
    spec = manifest.backbone
    if network is None and not (is_known(spec.name) or spec.name.startswith(TIMM)):
        raise SpecError(
            f"the bundle's network is {spec.name}, a module of your own, which its manifest cannot make. Fix: in "
            "Python, give the module: deploykit.export.torch_layers.torch_layers(FOLDER, module)."
        )
    if network is None:
        backbone = build_any(spec.name, _request(manifest, pretrained, checkpoint_key))
    elif isinstance(network, BaseBackbone) and network.is_described:
        backbone = network
    else:
        shape = BackboneRequest(image_size=spec.image_size, in_channels=spec.in_channels)
        backbone = build_any(network, shape)
    _check_same(backbone, manifest, pretrained if network is None else "the module")
    return backbone


def _request(manifest: Manifest, pretrained: Pretrained, checkpoint_key: str | None) -> BackboneRequest:
    spec = manifest.backbone
    return BackboneRequest(
        features_only=spec.features_only,
        output_indices=tuple(level.index for level in spec.levels),
        output_stride=spec.output_stride,
        num_classes=spec.num_classes,
        in_channels=spec.in_channels,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        hierarchical=spec.hierarchical,
        pretrained=pretrained,
        checkpoint_key=checkpoint_key,
    )


def _check_same(backbone: BaseBackbone, manifest: Manifest, source: object) -> None:
    ours, theirs = (asdict(spec) for spec in (backbone.spec, manifest.backbone))
    free = {"weights", "label_set"} | ({"image_size"} if manifest.input.sizes is not None else set())
    differing = sorted(name for name in ours if ours[name] != theirs[name] and name not in free)
    if differing:
        for side in (ours, theirs):
            side["levels"] = ", ".join(level["name"] for level in side["levels"]) or "none"
        listed = "; ".join(f"{name} {ours[name]}, in the bundle {theirs[name]}" for name in differing)
        raise SpecError(
            f"the torch network is another than the bundle's: {listed}. Fix: give the one that was exported."
        )
    if weights_digest(backbone) == manifest.weights_digest:
        return
    what = "random weights" if source is False else f"the weights of {'the default' if source is True else source}"
    known = manifest.backbone.weights
    called = f"The bundle calls its weights {known!r}" if known else "The bundle does not say where they came from"
    raise WeightsError(
        f"the torch network has {what}, which are not those that the bundle was exported with. {called}. Fix: give "
        "the checkpoint that was exported with pretrained=<file>."
    )


def _check_not_equalized(manifest: Manifest) -> None:
    if manifest.fusions.get(EQUALIZED, 0):
        raise SpecError(
            "the channels of the bundle's layers were scaled against each other before it was quantized, so that its "
            "tensors and torch's do not correspond. Fix: look at the FP32 bundle beside torch, and at this one alone."
        )


def _program(backbone: BaseBackbone, manifest: Manifest, images: ImageArray) -> TorchProgram:
    """Trace and fuse a network as an export does."""
    spec = manifest.input.as_images()
    program = fuse(trace(backbone, spec), spec, network_images(images, manifest.input)).program
    outputs = tuple(TensorSpec(name=name, shape=(BATCH_DIM,)) for name in output_names(backbone))
    return TorchProgram(input=spec, outputs=outputs, program=program)


def _gate(manifest: Manifest) -> float | None:
    """Return what every layer must reach, in dB: the precision's own budget; an INT8 layer has none."""
    precision = parse_precision(manifest.precision)
    return None if isinstance(precision, Int8) else precision.min_sqnr_db


class _TorchNetwork:
    """A traced network as the reference of a walk, on the images that one call of the engine takes."""

    def __init__(self, program: ProgramValues, manifest: Manifest, images: ImageArray, batch: int) -> None:
        self.program = program
        self.outputs = tuple(output.name for output in manifest.outputs)
        self.batch: ImageArray = np.ascontiguousarray(images[np.arange(batch) % len(images)])
        self._taken: FloatArray = network_images(self.batch, manifest.input)
        self._source = manifest.input.name

    def give(self, names: Sequence[str]) -> list[Array]:
        """Return tensors by name; the images under the input's."""
        found = self.program.give(names, self._taken)
        return [found[name] for name in names]

    def shared(self, model: ir.Model) -> list[str]:
        """Return the tensors that a graph has too, in its order.

        One of another shape inside the network is not the same tensor: a runtime may fold or pad it.
        """
        names = shared_tensors(model, self.program.nodes)
        shapes = {str(value.name): value.shape for node in model.graph for value in node.outputs}
        given = self.program.give(names, self._taken)
        return [name for name in names if name in given and (name in self.outputs or _fits(given[name], shapes[name]))]


def _fits(array: Array, shape: ir.Shape | None) -> bool:
    if shape is None:
        return True
    sides = tuple(shape)
    return len(sides) == array.ndim and all(
        not isinstance(side, int) or side == own for side, own in zip(sides, array.shape, strict=True)
    )


def compare_with_torch(
    model: ir.Model,
    network: _TorchNetwork,
    *,
    min_own_db: float | None,
    modules: dict[str, str],
    reproducer: Path | None = None,
) -> LayerReport:
    """Compare a typed graph with the network that it was written from, layer by layer."""
    names = network.shared(model)
    producers = {str(value.name): str(node.name) for node in model.graph for value in node.outputs}
    paths = {producers[name]: path for name in names if (path := module_of(network.program.nodes[name])) is not None}
    walk = Walk(model, network.give, names, network.batch)
    layers = with_outputs(
        layer_errors(model, walk, names, paths | modules),
        model,
        wrong_outputs(model, walk, network.outputs, network.outputs),
        paths,
    )
    report = LayerReport(reference="torch fp32", images=len(network.batch), min_own_db=min_own_db, layers=tuple(layers))
    reproduce(report, walk, reproducer)
    return report
