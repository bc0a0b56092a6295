"""Which of inductor's modes is the fastest for a network on this machine: measured once, and remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deploykit.backends.inductor.adapter import machine_tie
from deploykit.backends.inductor.targets import INDUCTOR_MODES
from deploykit.cache import default_root
from deploykit.optional import require
from deploykit.timing import time_calls

if TYPE_CHECKING:
    from torch.export import ExportedProgram

logger = logging.getLogger(__name__)

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


class ModeMemory:
    """Choices made before on this machine, one small file each.

    Args:
        root: the folder; None: ``inductor-modes`` beside the engine cache's folder.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else default_root() / "inductor-modes"

    def recall(self, key: str) -> ModeChoice | None:
        """The choice under ``key``; None where there is none, or none that can be read."""
        try:
            choice = msgspec.json.decode((self.root / f"{key}.json").read_bytes(), type=ModeChoice)
        except (OSError, msgspec.MsgspecError):
            return None
        return choice if choice.mode in INDUCTOR_MODES else None

    def keep(self, key: str, choice: ModeChoice) -> None:
        """Write a choice, whole or not at all; where the folder cannot be written, a log line says so."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root, delete=False) as scratch:
                scratch.write(msgspec.json.encode(choice))
            Path(scratch.name).replace(self.root / f"{key}.json")
        except OSError as error:
            logger.warning("The mode is not remembered, because %s cannot be written: %s", self.root, error)


def memory_key(program: ExportedProgram) -> str:
    """The digest of what decides a choice: the work, torch, the processor's instructions, threads, the modes.

    Outputs are no part of it, so a network and a part of it with the same work share one choice.
    """
    torch = require("torch")
    parts = {
        "work": weighted_work(program),
        "torch": str(torch.__version__),
        "machine": machine_tie(),
        "threads": torch.get_num_threads(),
        "modes": INDUCTOR_MODES,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weighted_work(program: ExportedProgram) -> list[tuple[str, ...]]:
    """Every convolution and linear, sorted: operator, shapes of input and weight, dtype, and what gives the weight."""
    aten = require("torch").ops.aten
    operators = {aten.conv2d.default, aten.conv2d.padding, aten.linear.default}
    nodes: list[Any] = [node for node in program.graph.nodes if node.target in operators]
    return sorted(_described(node) for node in nodes)


def _described(node: Any) -> tuple[str, ...]:
    source, weight = (operand.meta["val"] for operand in node.args[:2])
    restored = "" if node.args[1].op == "placeholder" else str(node.args[1].target)  # of INT8, a dequantization
    return (str(node.target), str(tuple(source.shape)), str(tuple(weight.shape)), str(weight.dtype), restored)


def fastest(calls: Mapping[str, Callable[[], object]]) -> ModeChoice:
    """The mode whose call takes the least time, called in turns with the others."""
    medians, _ = time_calls(list(calls.values()))
    milliseconds = {mode: round(taken, 3) for mode, taken in zip(calls, medians, strict=True)}
    return ModeChoice(mode=min(milliseconds, key=milliseconds.__getitem__), milliseconds=milliseconds)
