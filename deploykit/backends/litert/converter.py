"""The converter's own process: a saved torch program -> a .tflite file.

litert-torch brings jax and torchao, whose threads and loggers stay, and a C++ library that may end its process. Started
by `deploykit.backends.litert.lower` as ``python -m deploykit.backends.litert.converter REQUEST``.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed, which programs may call
from torch import Tensor, nn
from torch.fx import GraphModule

from deploykit.backends.conversion import ConversionRequest, answer, load_module
from deploykit.backends.litert.delegated import fit_delegate
from deploykit.backends.litert.half_weights import store_halves
from deploykit.backends.litert.integer_weights import IntegerWeight, check_integers, write_integers


class Named(nn.Module):
    """A program called with the images by name, which returns its outputs by name."""

    def __init__(self, whole: GraphModule, names: tuple[str, ...]) -> None:
        super().__init__()
        self.whole = whole
        self._names = names
        self.training = False  # train(), which eval() calls, is refused by a program's module

    def forward(self, **images: Tensor) -> dict[str, Tensor]:
        """Map ``(N, C, H, W)``, or pixels ``(N, H, W, C)``, to the dict of outputs."""
        return dict(zip(self._names, self.whole(*images.values()), strict=True))


def convert(request: ConversionRequest) -> None:
    """Write the engine that a request asks for."""
    import litert_torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = Named(load_module(request), request.outputs)
        weights = adapt_weights(module.whole) if request.quantized else []
        example = {request.input: torch.zeros(request.shape, dtype=getattr(torch, request.dtype))}
        with torch.no_grad():
            model = litert_torch.convert(module, sample_kwargs=example, quant_config=_quantization(request))
        content = write_integers(model.model_content(), weights)
        check_integers(content, weights)
        content = store_halves(fit_delegate(content))
        Path(request.engine).write_bytes(content)


def adapt_weights(module: GraphModule) -> list[IntegerWeight]:
    """Rewrite each ``DQ(int8)`` of a weight, in place, as the converter takes it; return all of them.

    Those of convolutions become ``DQ(Q(float))``, since the converter refuses constants of int8. Those of linears
    become float constants, into which `write_integers` writes their integers later.
    """
    operators = torch.ops.quantized_decomposed
    weights = []
    for node in list(module.graph.nodes):
        if node.target != operators.dequantize_per_channel.default:
            continue
        integers, scales = (_constant(module, argument).numpy() for argument in node.args[:2])
        (reader,) = node.users
        dynamic = reader.target == torch.ops.aten.linear.default
        weight = IntegerWeight(name=reader.name, integers=integers, scales=scales, dynamic=dynamic)
        module.register_buffer(f"{node.name}_floats", torch.from_numpy(weight.floats))
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(f"{node.name}_floats")
            if dynamic:
                node.replace_all_uses_with(constant)
            else:
                parts = (constant, *node.args[1:])
                node.update_arg(0, module.graph.call_function(operators.quantize_per_channel.default, parts))
        weights.append(weight)
    module.graph.eliminate_dead_code()
    module.recompile()
    return weights


def _constant(module: GraphModule, node: Any) -> Tensor:
    owner, _, name = str(node.target).rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), name)
    return value.detach()


def _quantization(request: ConversionRequest) -> Any:
    """Return the configuration that makes integers of Q/DQ operators; their parameters are the program's own."""
    if not request.quantized:
        return None
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    settings = get_symmetric_quantization_config(is_per_channel=True)
    return QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(settings))


if __name__ == "__main__":
    # The default partitioner transposes maps between convolutions and back.
    os.environ |= {"LITERT_TORCH_SHOW_PROGRESS": "n", "LAYOUT_OPTIMIZE_PARTITIONER": "GREEDY"}
    sys.exit(answer(sys.argv[1], convert))
