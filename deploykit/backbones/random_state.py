"""The global generators of Python, NumPy and torch, which a user's forward may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

States: TypeAlias = tuple[tuple[object, ...], Any, Tensor]


@contextmanager
def kept_random_states(seed: int | None = None) -> Iterator[None]:
    """Restore the generators on the way out; within, they start from ``seed``, or from where they are."""
    states = random_states()
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def random_states() -> States:
    """Return where the three generators are; torch's is the CPU's."""
    return random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()


def same_states(one: States, other: States) -> bool:
    """Return whether nothing was drawn between two states."""
    numpy_same = all(map(np.array_equal, one[1], other[1]))
    return bool(one[0] == other[0]) and numpy_same and torch.equal(one[2], other[2])
