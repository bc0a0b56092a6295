"""What a .pte file computes outside its delegate, and in float inside of it, read from the file."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np

from deploykit.backends.executorch.delegate_graph import Layer, delegated_layers
from deploykit.backends.executorch.program_file import ProgramFile


def left_in_float(engine: Path) -> dict[str, int]:
    """Count the calls of the delegate, its layers in float, and the kernels outside of it, by operator."""
    content = engine.read_bytes()
    program = ProgramFile(content)
    layers = [layer for layer in delegated_layers(content) if not layer.integer_weight and not _is_mean(layer)]
    floats = Counter(f"float {layer.kind}" for layer in layers)
    return {"delegate calls": program.delegate_calls(), **dict(sorted((floats + program.kernels()).items()))}


def _is_mean(layer: Layer) -> bool:
    """Return whether a layer is the mean of a norm: a product whose rows have the weight 1/n in n places, n > 1."""
    weights = np.frombuffer(layer.weight, np.float32)
    share = float(weights.max(initial=0))
    if not 0 < share < 1 or not set(np.unique(weights).tolist()) <= {0.0, share}:
        return False
    count = round(1 / share)
    return math.isclose(count * share, 1, rel_tol=1e-6) and np.count_nonzero(weights) % count == 0


def describe_coverage(content: bytes) -> dict[str, str]:
    """Return what the manifest says of an engine: how often a run enters the delegate, and what runs outside of it."""
    program = ProgramFile(content)
    outside = ", ".join(f"{count} {name}" for name, count in sorted(program.kernels().items()))
    return {"delegate_calls": str(program.delegate_calls()), "outside_the_delegate": outside or "nothing"}
