"""A plan's integers in a torch program, and the proof that a package has them: weights, and what their layers read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.fx import GraphModule, Node

from deploykit.arrays import FloatArray
from deploykit.backends.coreml.mil_program import MilProgram, Operation
from deploykit.calibration.torch_integers import value_of
from deploykit.errors import ExportError
from deploykit.fusion.constants import operand

_MOVES = ("reshape", "transpose", "squeeze", "expand_dims")

_REMEDY = "Keep the layer in float in the plan, or export for another runtime."


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer in integers: its weight in int8 with one scale for each output, and the range of what it reads in int8.

    ``name`` is no part of what is compared.
    """

    name: str
    integers: bytes
    scales: bytes
    scale: bytes
    zero_point: int

    @property
    def key(self) -> tuple[bytes, bytes, bytes, int]:
        """What a package must have of it."""
        return self.integers, self.scales, self.scale, self.zero_point


def holds_half(scales: FloatArray) -> bool:
    """Return whether float16 has these scales in full precision; smaller ones lose bits, down to zero."""
    return bool((scales >= np.finfo(np.float16).tiny).all() and (scales <= np.finfo(np.float16).max).all())


def planned_layers(module: GraphModule, *, half: bool) -> list[Layer]:
    """Return every layer of a program whose weight is behind a DQ for each channel.

    ``half``: scales are in float16 in the package, where that holds them.
    """
    restore = torch.ops.quantized_decomposed.dequantize_per_channel.default
    return [_planned(module, node, half) for node in module.graph.nodes if node.target == restore]


def _planned(module: GraphModule, restored: Node, half: bool) -> Layer:
    (layer,) = restored.users
    integers, scales = (value_of(module, operand(restored, position)).numpy() for position in range(2))
    source = operand(layer, 0)
    if source.target != torch.ops.quantized_decomposed.dequantize_per_tensor.default:
        raise ExportError(f"{layer.name} reads {source.name} in float, and the plan has no range of it. {_REMEDY}")
    return Layer(
        name=layer.name,
        integers=integers.tobytes(),
        scales=_stored(scales, half),
        scale=_stored(np.asarray(source.args[1], np.float32), half),
        zero_point=int(source.args[2]),  # type: ignore[arg-type]  # a number, which torch types as any argument
    )


def _stored(scales: FloatArray, half: bool) -> bytes:
    return scales.astype(np.float16 if half and holds_half(scales) else np.float32).tobytes()


def check_integers(program: MilProgram, planned: list[Layer]) -> None:
    """Prove that a package has the plan's integers, in every planned layer.

    Raises:
        ExportError: a layer's weight or what it reads is in float, or in other integers; the message names all of them.
    """
    found = {layer.key for layer in integer_layers(program)}
    missing = [layer.name for layer in planned if layer.key not in found]
    if missing:
        raise ExportError(
            f"coremltools changed the integers of {', '.join(missing)}: the package does not have the plan's. {_REMEDY}"
        )


def integer_layers(program: MilProgram) -> list[Layer]:
    """Return every layer of a package with an int8 weight that reads rounded values."""
    found = []
    for operation, weight in program.weighted():
        read = _rounding(program, operation)
        if weight.kind == "constexpr_affine_dequantize" and read is not None:
            integers, scales, zeros = (weight.constants[name] for name in ("quantized_data", "scale", "zero_point"))
            if not np.any(np.frombuffer(zeros, np.int8)):
                scale, zero_point = read
                found.append(
                    Layer(name=operation.output, integers=integers, scales=scales, scale=scale, zero_point=zero_point)
                )
    return found


def _rounding(program: MilProgram, layer: Operation) -> tuple[bytes, int] | None:
    """Return the scale and the int8 zero point of what a layer reads; None where it reads floats.

    coremltools writes int8 with the zero point -128 as uint8 with 0, which is the same, and moves reshapes and
    permutations from the floats to the integers.
    """
    restored = program.maker(layer, "x", through_casts=True)
    rounded = program.maker(restored, "input") if restored is not None and restored.kind == "dequantize" else None
    while rounded is not None and rounded.kind in _MOVES:
        rounded = program.maker(rounded, "x")
    if restored is None or rounded is None or rounded.kind != "quantize":
        return None
    scales = [program.constant(each, "scale") for each in (rounded, restored)]
    zeros = [program.constant(each, "zero_point") for each in (rounded, restored)]
    if scales[0] is None or scales[0] != scales[1] or zeros[0] != zeros[1]:
        return None
    unsigned = program.constant(rounded, "output_dtype") == b"uint8"
    zero_point = 0 if zeros[0] is None else int(np.frombuffer(zeros[0], np.uint8 if unsigned else np.int8)[0])
    return scales[0], zero_point - (128 if unsigned else 0)
