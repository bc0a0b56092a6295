"""What a .pte file computes in its delegate and outside of it, read from the file."""

from __future__ import annotations

from pathlib import Path

from deploykit.backends.executorch.program_file import ProgramFile


def left_in_float(engine: Path) -> dict[str, int]:
    """Count the calls of the delegate, and those of kernels outside of it, by operator."""
    program = ProgramFile(engine.read_bytes())
    return {"delegate calls": program.delegate_calls(), **dict(sorted(program.kernels().items()))}


def describe_coverage(content: bytes) -> dict[str, str]:
    """Return what the manifest says of an engine: how often a run enters the delegate, and what runs outside of it."""
    program = ProgramFile(content)
    outside = ", ".join(f"{count} {name}" for name, count in sorted(program.kernels().items()))
    return {"delegate_calls": str(program.delegate_calls()), "outside_the_delegate": outside or "nothing"}
