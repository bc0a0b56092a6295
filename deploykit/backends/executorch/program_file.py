"""A .pte file: the kernels and delegates that a run calls, and the data of the delegates.

The fields are those of ``schema/program.fbs`` in the package executorch.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator

from deploykit.backends.executorch.adapter import FORWARD
from deploykit.backends.executorch.flatbuffer import Table

_HEADER = 8
"""Where the magic bytes ``eh00`` stand; the offset of the segments is 16 bytes behind them."""

_KERNEL_CALL, _DELEGATE_CALL = 1, 2
_IN_A_SEGMENT = 1


class ProgramFile:
    """The method ``forward`` of a .pte file."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._program = Table.root(content)
        self._plan = next(plan for plan in self._program.tables(1) if plan.text(0) == FORWARD)

    def kernels(self) -> Counter[str]:
        """Count the kernels that a run calls outside delegates: ``{"aten::mean.out": 1}``."""
        operators = [_operator_name(operator) for operator in self._plan.tables(6)]
        return Counter(operators[call.number(0, "i")] for kind, call in self._calls() if kind == _KERNEL_CALL)

    def delegate_calls(self) -> int:
        """Return how many times a run enters a delegate."""
        return sum(kind == _DELEGATE_CALL for kind, _ in self._calls())

    def delegates(self) -> list[bytes]:
        """Return what each delegate was compiled to."""
        found = []
        for delegate in self._plan.tables(7):
            data = delegate.table(1)
            if data is None:
                continue
            index = data.number(1, "I")
            if data.number(0, "b") == _IN_A_SEGMENT:
                found.append(self._segment(index))
            else:
                found.append(self._program.tables(3)[index].numbers(0, "B").tobytes())
        return found

    def named_data(self) -> dict[str, bytes]:
        """Return the constants that delegates look up by a key."""
        return {each.text(0): self._segment(each.number(1, "I")) for each in self._program.tables(7)}

    def _calls(self) -> Iterator[tuple[int, Table]]:
        for chain in self._plan.tables(5):
            for instruction in chain.tables(2):
                call = instruction.table(1)
                if call is not None:
                    yield instruction.number(0, "B"), call

    def _segment(self, index: int) -> bytes:
        (base,) = struct.unpack_from("<Q", self._content, _HEADER + 16)
        segment = self._program.tables(4)[index]
        start = base + segment.number(0, "Q")
        return self._content[start : start + segment.number(1, "Q")]


def _operator_name(operator: Table) -> str:
    name, overload = operator.text(0), operator.text(1)
    return f"{name}.{overload}" if overload else name
