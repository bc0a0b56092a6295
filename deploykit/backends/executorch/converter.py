"""The converter's own process: a saved torch program -> a .pte file.

ExecuTorch's exporter imports torchao, whose loggers write to the terminal. Started by
`deploykit.backends.executorch.lower` as ``python -m deploykit.backends.executorch.converter REQUEST``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed, which programs may call
from torch import Tensor, nn

from deploykit.backends.conversion import ConversionRequest, answer
from deploykit.backends.executorch.adapter import INPUT_NAME, OUTPUT_NAMES
from deploykit.backends.executorch.package import load_library
from deploykit.backends.executorch.program_file import ProgramFile


class Whole(nn.Module):
    """A program's module, which takes the images of any batch."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.whole = program.module(check_guards=False)
        self.training = False  # train(), which eval() calls, is refused by a program's module

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map ``(N, C, H, W)``, or pixels ``(N, H, W, C)``, to the tuple of outputs."""
        return tuple(self.whole(images))


def convert(request: ConversionRequest) -> None:
    """Write the engine that a request asks for."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = Whole(torch.export.load(request.program))
        example = (torch.zeros(request.shape, dtype=getattr(torch, request.dtype)),)
        edge = to_edge_transform_and_lower(
            torch.export.export(module, example),
            partitioner=[XnnpackPartitioner()],
            constant_methods={INPUT_NAME: [request.input], OUTPUT_NAMES: list(request.outputs)},
        )
        content = bytes(edge.to_executorch().buffer)
    _check_operators(content)
    Path(request.engine).write_bytes(content)


def _check_operators(content: bytes) -> None:
    """Refuse what the runtime would refuse when it opens the file.

    Raises:
        NotImplementedError: an operator outside the delegate that the runtime has no kernel of.
    """
    known = set(load_library()._get_operator_names())
    for operator in ProgramFile(content).kernels():
        if operator not in known:
            raise NotImplementedError(f"no kernel of {operator}")


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1], convert))
