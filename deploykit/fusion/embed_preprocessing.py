"""Network(images) -> Network'(pixels): images = pixels * 1/(255 * std) - mean/std, channel by channel.

In ONNX, where a convolution in FP32 alone reads the images, its weight takes the scale:
w' = w / (255 * std). Without padding its bias takes the mean as well, b' = b - sum(w * mean / std),
and only the cast and the transpose are left. With padding the mean stays a subtraction before it,
pixels - 255 * mean, since a padded zero stands for the mean and not for black: so the fold is exact
at the borders too. Everywhere else (INT8 and FP16 graphs, an explicit Pad) the pixels are
multiplied and added, before the input's Q/DQ nodes or casts, which stay as they were calibrated.
Inductor fuses all of it into the layout change before the convolution, so there the arithmetic is
written out.

The arithmetic stands before the transpose, with constants of one row of pixels, (1, 1, W, C):
OpenVINO then merges the transpose into the convolution's own layout, and ONNX Runtime loops over
whole rows. With constants of C values its innermost loop has 3 steps, which costs 0.5 ms at 224x224.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from deploykit.backends.torch.adapter import PixelNormalization, scale_and_shift
from deploykit.errors import ExportError
from deploykit.graph import Graph, OnnxGraph
from deploykit.spec import InputSpec, Preprocessing

FloatArray = npt.NDArray[np.float32]


def embed_preprocessing(graph: Graph, spec: InputSpec) -> Graph:
    """Return a graph that takes the input of ``spec``: the same graph, or one called with uint8 pixels.

    Args:
        graph: in any precision, called with normalised images; it stays as it is.
        spec: the engine's input.

    Raises:
        ExportError: torch cannot trace the stage.
    """
    if not spec.embeds_preprocessing:
        return graph
    if isinstance(graph, OnnxGraph):
        return replace(graph, input=spec, model=_embed_in_model(graph.model, spec))
    return replace(graph, input=spec, program=_embed_in_program(graph.program, spec))


class _Embedded(nn.Module):
    """A traced module behind its preprocessing."""

    def __init__(self, whole: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.normalization = PixelNormalization(preprocessing)
        self.whole = whole

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = tuple(self.whole(self.normalization(pixels)))
        return outputs


def _embed_in_program(program: torch.export.ExportedProgram, spec: InputSpec) -> torch.export.ExportedProgram:
    dynamic = not isinstance(spec.batch, int)
    example = torch.zeros(spec.shape_at(spec.batch if isinstance(spec.batch, int) else 2), dtype=torch.uint8)
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None  # with the bounds of the program inside
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations while it traces
            return torch.export.export(
                _Embedded(program.module(), spec.preprocessing), (example,), dynamic_shapes=shapes
            )
    except Exception as error:  # torch.export raises dozens of internal types
        raise ExportError(
            f"torch.export cannot trace the preprocessing at {spec.shape}: {str(error).strip().splitlines()[0]}. "
            "Export without embedded preprocessing."
        ) from error


def _embed_in_model(model: ir.Model, spec: InputSpec) -> ir.Model:
    whole = model.clone()
    graph = whole.graph
    images = graph.inputs[0]
    images.name = f"{spec.name}/normalised"
    pixels = ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(ir.DataType.UINT8))
    # TensorRT takes uint8 only as the input of a cast, so the cast comes first.
    cast = ir.node("Cast", [pixels], {"to": ir.DataType.FLOAT}, name=f"{spec.name}/cast")
    arithmetic = _normalise(graph, images, cast.outputs[0], spec)
    scaled = (cast, *arithmetic)[-1].outputs[0]
    transpose = ir.node("Transpose", [scaled], {"perm": [0, 3, 1, 2]}, name=f"{spec.name}/transpose")
    transpose.outputs[0].name = images.name
    ir.convenience.replace_all_uses_with(images, transpose.outputs[0])
    graph.inputs[0] = pixels
    graph.insert_before(graph[0], [cast, *arithmetic, transpose])
    return whole


def _normalise(graph: ir.Graph, images: ir.Value, pixels: ir.Value, spec: InputSpec) -> list[ir.Node]:
    """Return the arithmetic on the pixels, less what the graph's first convolution can take over."""
    scale, shift = scale_and_shift(spec.preprocessing)
    stem = _foldable_stem(graph, images)
    if stem is None:
        multiply = _with_row(graph, "Mul", pixels, f"{spec.name}/scale", _row(scale, spec))
        return [multiply, _with_row(graph, "Add", multiply.outputs[0], f"{spec.name}/shift", _row(shift, spec))]
    weight = _array(stem.inputs[1])
    _replace_constant(graph, stem, 1, weight * scale.reshape(1, -1, 1, 1))
    if _is_padded(stem):
        return [_with_row(graph, "Sub", pixels, f"{spec.name}/mean", _row(_mean_pixel(spec), spec))]
    constant = np.einsum("oihw,i->o", weight.astype(np.float64), shift.astype(np.float64))
    bias = _array(stem.inputs[2]) if len(stem.inputs) > 2 and stem.inputs[2] is not None else 0.0
    _replace_constant(graph, stem, 2, (bias + constant).astype(np.float32))
    return []


def _mean_pixel(spec: InputSpec) -> FloatArray:
    return (255 * np.asarray(spec.preprocessing.mean, np.float64)).astype(np.float32)


def _foldable_stem(graph: ir.Graph, images: ir.Value) -> ir.Node | None:
    """Return the FP32 convolution over all channels that alone reads the images, with constants of its own."""
    readers = list(images.uses())
    stem = readers[0].node if len(readers) == 1 else None
    if stem is None or stem.op_type != "Conv" or stem.attributes.get_int("group", 1) != 1:
        return None
    constants = [value for value in stem.inputs[1:] if value is not None]
    rank = len(stem.inputs[1].shape or ()) if stem.inputs[1] is not None else 0
    own = all(value.is_initializer() and value.dtype == ir.DataType.FLOAT for value in constants)
    return stem if own and rank == 4 else None


def _is_padded(stem: ir.Node) -> bool:
    automatic = stem.attributes.get_string("auto_pad", "NOTSET")
    return automatic not in ("NOTSET", "VALID") or any(stem.attributes.get_ints("pads", ()))


def _with_row(graph: ir.Graph, operator: str, value: ir.Value, name: str, row: FloatArray) -> ir.Node:
    return ir.node(operator, [value, _constant(graph, f"{name}/row", row)], name=name)


def _row(channels: FloatArray, spec: InputSpec) -> FloatArray:
    """Return one value a channel, written out for a row of pixels where its width is fixed: ``(1, 1, W or 1, C)``."""
    return np.tile(channels, (1, 1, spec.width if spec.sizes is None else 1, 1))


def _replace_constant(graph: ir.Graph, stem: ir.Node, position: int, array: FloatArray) -> None:
    """Give a convolution a new weight or bias; another reader of the old one keeps it."""
    old = stem.inputs[position] if position < len(stem.inputs) else None
    if position >= len(stem.inputs):
        stem.resize_inputs(position + 1)
    name = old.name if old is not None else f"{stem.name}/bias"
    stem.replace_input_with(position, _constant(graph, f"{name}/embedded", array))
    if old is not None and not list(old.uses()):
        del graph.initializers[str(old.name)]


def _constant(graph: ir.Graph, name: str, array: FloatArray) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array, np.float32), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _array(value: ir.Value | None) -> FloatArray:
    assert value is not None  # noqa: S101  (checked by _foldable_stem; narrows the type)
    assert value.const_value is not None  # noqa: S101
    return np.asarray(value.const_value.numpy(), np.float32)
