"""The converter's own process: a saved torch program -> a .pte file.

ExecuTorch's exporter imports torchao, whose loggers write to the terminal. Started by
`deploykit.backends.executorch.lower` as ``python -m deploykit.backends.executorch.converter REQUEST``.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed, which programs may call
from torch import Tensor

from deploykit.backends.conversion import ConversionRequest, Whole, answer, load_module
from deploykit.backends.executorch.adapter import FORWARD, INPUT_NAME, OUTPUT_NAMES
from deploykit.backends.executorch.integer_weights import check_integers, planned_weights
from deploykit.backends.executorch.package import load_library
from deploykit.backends.executorch.program_file import ProgramFile
from deploykit.fusion.fold_dimensions import beyond_five, fold_dimensions


def convert(request: ConversionRequest) -> None:
    """Write the engine that a request asks for."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = Whole(load_module(request))
        if not any(beyond_five(module.whole.graph)):
            fold_dimensions(module.whole)  # the delegate's runtime has at most six
        weights = planned_weights(module.whole)
        example = (torch.zeros(request.shape, dtype=getattr(torch, request.dtype)),)
        edge = to_edge_transform_and_lower(
            torch.export.export(module, example),
            partitioner=[XnnpackPartitioner()],
            constant_methods={INPUT_NAME: [request.input], OUTPUT_NAMES: list(request.outputs)},
        )
        content = bytes(edge.to_executorch().buffer)
    check_integers(content, weights)
    _check_operators(content)
    _check_run(content, example[0])
    Path(request.engine).write_bytes(content)


def _check_operators(content: bytes) -> None:
    """Refuse what the runtime would refuse when it opens the file.

    Raises:
        RuntimeError: an operator outside the delegate has no kernel there.
    """
    known = set(load_library()._get_operator_names())
    for operator in ProgramFile(content).kernels():
        if operator not in known:
            raise RuntimeError(f"no kernel of {operator}")


def _check_run(content: bytes, images: Tensor) -> None:
    """Open the file and run it once: the delegate's compiler takes some programs that its runtime refuses.

    Raises:
        RuntimeError: the runtime refuses it; with what it logged.
    """
    library = load_library()
    with tempfile.TemporaryFile() as log, _errors_to(log.fileno()):
        try:
            program = library._load_program_from_buffer(
                content, program_verification=library.Verification.InternalConsistency
            )
            program.load_method(FORWARD).call([images])
        except RuntimeError as error:
            log.seek(0)
            said = [line for line in log.read().decode(errors="replace").splitlines() if "cpuinfo" not in line]
            raise RuntimeError(f"the runtime refuses the program: {error}: {'; '.join(said)}") from error


@contextmanager
def _errors_to(file: int) -> Iterator[None]:
    """Let the process write its standard error, C++ libraries included, into a file meanwhile."""
    kept = os.dup(2)
    os.dup2(file, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1], convert))
