"""Q(x, s_c) before a depthwise convolution -> Q(x * s / s_c, s): one scale a tensor, the channels' in the weights.

Integer kernels take one scale an activation, and NNCF gives the input of a depthwise convolution one a channel. The
convolution before it is multiplied by s / s_c and the depthwise one by s_c / s, both in their scales: every integer
stays. A Clip between them becomes the bound at which the integers end.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.calibration.strip_quantizers import Stripped, TensorQuantizer
from deploykit.errors import QuantizedModelError
from deploykit.onnx_values import add_constant, array_of

LEAST_SHARE = 1e-4
"""The smallest scale of a channel, as a share of the largest: that of a channel that is always zero means nothing."""

ScaleArray = npt.NDArray[np.float32]


def fold_channel_scales(stripped: Stripped) -> None:
    """Replace every activation's scales by one, in place.

    Raises:
        QuantizedModelError: an activation with scales by channel whose writer and readers cannot take them.
    """
    values = {str(value.name): value for node in stripped.model.graph for value in node.outputs}
    problems = []
    for name, scales in stripped.channel_scales.items():
        value = values.get(name)
        parts = None if value is None else _around(value, len(scales))
        if parts is None:
            problems.append(name)
            continue
        writer, activation, readers = parts
        largest = np.float32(scales.max())
        factors = np.asarray(largest / np.maximum(scales, largest * LEAST_SHARE), np.float32)
        _scale(stripped, writer, factors)
        for reader in readers:
            shape = array_of(reader.inputs[1]).shape
            _scale(
                stripped,
                reader,
                np.asarray(np.repeat(1 / factors, shape[0] // len(factors)), np.float32),
                with_bias=False,
            )
        if activation is not None and activation.op_type == "Clip":
            bound = add_constant(stripped.model.graph, f"{name}/bound", np.array(255 * largest, np.float32))
            activation.replace_input_with(2, bound)
        stripped.activations[name] = TensorQuantizer(scale=float(largest), zero_point=0)
    if problems:
        raise QuantizedModelError(
            f"activations have one scale a channel, and do not stand between a convolution with ReLU or ReLU6 and a "
            f"depthwise one: {', '.join(problems[:8])}. Fix: quantize activations per tensor (NNCF: "
            "QuantizationParameters(per_channel=False) as activations_quantization_params)."
        )


def _around(value: ir.Value, channels: int) -> tuple[ir.Node, ir.Node | None, list[ir.Node]] | None:
    """Return the convolution that writes a value, the activation between, and the depthwise ones that read it."""
    activation = value.producer()
    if activation is None:
        return None
    writer: ir.Node | None = activation
    if activation.op_type in ("Relu", "Clip"):
        source = activation.inputs[0]
        alone = source is not None and len(source.uses()) == 1 and not source.is_graph_output()
        writer = source.producer() if source is not None and alone else None
    readers = list(value.consumers())
    depthwise = all(
        node.op_type == "Conv" and node.attributes.get_int("group", 1) == channels > 1 and node.inputs[0] is value
        for node in readers
    )
    if writer is None or writer.op_type != "Conv" or not readers or not depthwise or value.is_graph_output():
        return None
    constants = [each for node in (writer, *readers) for each in node.inputs[1:] if each is not None]
    if not all(each.is_initializer() for each in constants):
        return None
    if activation.op_type == "Clip" and not (len(activation.inputs) > 2 and activation.inputs[2] is not None):
        return None
    return writer, None if writer is activation else activation, readers


def _scale(stripped: Stripped, conv: ir.Node, factors: ScaleArray, *, with_bias: bool = True) -> None:
    """Multiply the output channels of a convolution: its float weight, the scales of its integers, and its bias."""
    graph = stripped.model.graph
    weight = conv.inputs[1]
    assert weight is not None  # noqa: S101  (a convolution has a weight; narrows the type)
    old = stripped.weights.get(str(weight.name))
    values: ScaleArray = np.asarray(array_of(weight), np.float32)
    shape = [-1] + [1] * (values.ndim - 1)
    scaled = add_constant(
        graph, f"{conv.name}/{weight.name}/scaled", (values * factors.reshape(shape)).astype(np.float32)
    )
    conv.replace_input_with(1, scaled)
    if old is not None:
        stripped.weights[str(scaled.name)] = old.scaled(factors)
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    if with_bias and bias is not None:
        conv.replace_input_with(
            2, add_constant(graph, f"{conv.name}/bias/scaled", np.asarray(array_of(bias), np.float32) * factors)
        )
    for unread in (weight, *([bias] if bias is not None and with_bias else [])):
        if not unread.uses() and not unread.is_graph_output():
            graph.initializers.pop(str(unread.name), None)
