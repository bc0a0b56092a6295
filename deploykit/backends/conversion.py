"""Converting a torch program in a process of its own.

Converters bring libraries that start threads, write to the terminal and may end their process.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from deploykit.backends.build_process import run_build
from deploykit.errors import ExportError
from deploykit.fusion.locate import describe_node
from deploykit.fusion.quiet import quiet_torch
from deploykit.graph import TorchProgram

REFUSED = 3
"""The exit status where the converter refuses the network; the file ``reason`` has the converter's words."""

UNPROVED = 4
"""The exit status where the file is not what the plan says; the file ``reason`` has the whole message."""


@dataclass(frozen=True, kw_only=True)
class ConversionRequest:
    """What the process reads: files by their paths, the input, and the names of the outputs in order.

    ``quantized``: the program has Q/DQ operators. ``half_except``: as of a `TorchProgram`.
    """

    program: str
    engine: str
    reason: str
    input: str
    shape: tuple[int, ...]
    dtype: str
    outputs: tuple[str, ...]
    quantized: bool = False
    half_except: tuple[str, ...] | None = None


def write_request(graph: TorchProgram, scratch: Path, engine: str) -> ConversionRequest:
    """Save a program in a scratch folder and return the request that converts it; a dynamic batch becomes one image."""
    spec = graph.input
    batch = spec.batch if isinstance(spec.batch, int) else 1
    request = ConversionRequest(
        program=str(scratch / "program.pt2"),
        engine=str(scratch / engine),
        reason=str(scratch / "reason"),
        input=spec.name,
        shape=(batch, *(int(size) for size in spec.shape[1:])),
        dtype=spec.dtype,
        outputs=tuple(output.name for output in graph.outputs),
        quantized=any("quantized_decomposed" in str(node.target) for node in graph.program.graph.nodes),
        half_except=graph.half_except,
    )
    with quiet_torch():
        torch.export.save(graph.program, request.program)
    return request


@dataclass(frozen=True, kw_only=True)
class Converter:
    """A program that converts in a process of its own.

    ``module`` is its dotted name and calls `answer`; ``title`` is the format's and ``library`` the converting package's
    name, for messages. ``unknown``: what that says of an operator that it does not have, as regular expressions whose
    group ``operator`` is its name, such as ``aten.mean.dim``, ``aten::mean`` or ``mean``.
    """

    module: str
    title: str
    library: str
    unknown: tuple[str, ...]

    def refusal(self, reason: str, graph: TorchProgram) -> ExportError:
        """Return the error of a network that is refused in these words, with the operator where they name it."""
        for pattern in self.unknown:
            found = re.search(pattern, reason)
            if found is not None:
                operator = found["operator"].replace("::", ".")
                return lacks_operator(self.title, operator if "." in operator else f"aten.{operator}", graph)
        return ExportError(
            f"{self.library} does not convert the network: {' '.join(reason.split())[:400]}. "
            "Export for another runtime, or write the part that it names in other operators."
        )


def run_converter(converter: Converter, request: ConversionRequest, graph: TorchProgram) -> None:
    """Run a converter until the engine of a request is written.

    Args:
        converter: the program.
        request: what `write_request` returned.
        graph: what it was given.

    Raises:
        ExportError: it refused the network, crashed, or took too long.
    """
    file = Path(request.program).parent / "request.json"
    file.write_bytes(msgspec.json.encode(request))
    what = f"conversion to {converter.title}"
    done = run_build(what, converter.module, str(file), answers=(REFUSED, UNPROVED))
    if done.returncode != 0:
        reason = Path(request.reason).read_text(encoding="utf-8")
        raise converter.refusal(reason, graph) if done.returncode == REFUSED else ExportError(reason)


def lacks_operator(title: str, operator: str, graph: TorchProgram) -> ExportError:
    """Return the error of an operator that a format does not have, with the place of its first call.

    Args:
        title: of the format.
        operator: its name in torch, such as ``aten.mean.dim``; or without the overload, ``aten.mean``: any of them.
        graph: what calls it.
    """
    calls = [node for node in graph.program.graph.nodes if f"{node.target}.".startswith(f"{operator}.")]
    return ExportError(
        f"{title} has no {calls[0].target if calls else operator}, which the network calls"
        f"{f' ({describe_node(calls[0])})' if calls else ''}. Write that part in other operators, or export for "
        "another runtime."
    )


def load_module(request: ConversionRequest) -> GraphModule:
    """Load the program of a request as a module, every constant of which lies in memory in the order of its elements.

    LiteRT's converter takes constants that do not for one another where their shapes are the same.
    """
    module = torch.export.load(request.program).module(check_guards=False)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.contiguous()
    return module


class Whole(nn.Module):
    """A program's module, which takes the images of any batch."""

    def __init__(self, whole: GraphModule) -> None:
        super().__init__()
        self.whole = whole
        self.training = False  # train(), which eval() calls, is refused by a program's module

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map ``(N, C, H, W)``, or pixels ``(N, H, W, C)``, to the tuple of outputs."""
        return tuple(self.whole(images))


def answer(path: str, convert: Callable[[ConversionRequest], None]) -> int:
    """Convert what a request asks for, in the converter's own process; return the exit status."""
    request = msgspec.json.decode(Path(path).read_bytes(), type=ConversionRequest)
    try:
        convert(request)
    except ExportError as error:
        Path(request.reason).write_text(str(error), encoding="utf-8")
        return UNPROVED
    except Exception as error:  # converters raise what their stages raise; none of it is a type of its own
        Path(request.reason).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        return REFUSED
    return 0
