"""Which of inductor's modes is the fastest for a network on this machine: measured once, and remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from deploykit.backends.inductor.adapter import machine_tie
from deploykit.backends.inductor.targets import INDUCTOR_MODES
from deploykit.optional import require
from deploykit.store import Address, Store, address
from deploykit.timing import time_calls

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

DEFAULT_MODE = "onednn"
"""The mode where none was asked for and none is remembered."""


@dataclass(frozen=True, kw_only=True)
class ModeChoice:
    """The mode of a package, and the milliseconds a call of each mode measured: none where nothing was."""

    mode: str
    milliseconds: dict[str, float]

    def as_text(self) -> dict[str, str]:
        """For the manifest: the mode, and what each cost."""
        return {"mode": self.mode} | {f"{mode}_ms": f"{taken:.3f}" for mode, taken in self.milliseconds.items()}


def recall_mode(where: Address) -> ModeChoice | None:
    """Return the choice made before for the same work on this machine; None where there is none."""
    kept = Store().load(where)
    if kept is None:
        return None
    try:
        choice = msgspec.json.decode(kept, type=ModeChoice)
    except msgspec.MsgspecError:  # whole, and of another version's form
        return None
    return choice if choice.mode in INDUCTOR_MODES else None


def keep_mode(where: Address, choice: ModeChoice) -> None:
    """Keep a choice; where the store cannot be used, a log line says so."""
    Store().save(where, msgspec.json.encode(choice))


def mode_address(program: ExportedProgram) -> Address:
    """Return where a choice is kept, by what decides it: the work, torch, the instructions, threads, the modes.

    Outputs are no part of it, so a network and a part of it with the same work share one choice.
    """
    torch = require("torch")
    work = weighted_work(program)
    parts: dict[str, object] = {
        "work": work,
        "torch": str(torch.__version__),
        "machine": machine_tie(),
        "threads": torch.get_num_threads(),
        "modes": INDUCTOR_MODES,
    }
    return address("inductor-modes", parts, title=f"{len(work)} layers, torch {parts['torch']}")


def weighted_work(program: ExportedProgram) -> list[tuple[str, ...]]:
    """Every convolution and linear, sorted: operator, shapes of input and weight, dtype, and what gives the weight."""
    aten = require("torch").ops.aten
    operators = {aten.conv2d.default, aten.conv2d.padding, aten.linear.default}
    nodes: list[Node] = [node for node in program.graph.nodes if node.target in operators]
    return sorted(_described(node) for node in nodes)


def _described(node: Node) -> tuple[str, ...]:
    read, layer = node.all_input_nodes[:2]
    source, weight = read.meta["val"], layer.meta["val"]
    restored = "" if layer.op == "placeholder" else str(layer.target)  # of INT8, a dequantization
    return (str(node.target), str(tuple(source.shape)), str(tuple(weight.shape)), str(weight.dtype), restored)


def fastest(calls: Mapping[str, Callable[[], object]]) -> ModeChoice:
    """Return the mode whose call takes the least time, called in turns with the others."""
    medians, _ = time_calls(list(calls.values()))
    milliseconds = {mode: round(taken, 3) for mode, taken in zip(calls, medians, strict=True)}
    return ModeChoice(mode=min(milliseconds, key=milliseconds.__getitem__), milliseconds=milliseconds)
