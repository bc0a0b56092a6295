"""What several runners gave for the same inputs, compared without a way to pass by accident."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deploykit.arrays import Array
from deploykit.errors import ParityError
from deploykit.parity.metrics import sqnr_db

Arrays = dict[str, Array]


def compare_runs(runs: Mapping[str, Arrays], *, min_sqnr_db: float) -> None:
    """Compare what several runners gave, the first being the reference.

    Raises:
        ParityError: fewer than two runners, an output that one lacks, no data, another shape, or
            an SQNR below the budget; every such output is named.
    """
    if len(runs) < 2:
        raise ParityError(f"a comparison needs two runners; there is {len(runs)}: {', '.join(runs) or 'none'}.")
    (first, reference), *others = runs.items()
    faults = [] if reference else [f"{first} gave no output"]
    for runner, outputs in others:
        for name in dict.fromkeys((*reference, *outputs)):
            fault = _fault(reference.get(name), outputs.get(name), first, runner, min_sqnr_db)
            faults += [f"{name}: {fault}"] if fault else []
    if faults:
        raise ParityError("; ".join(faults))


def _fault(
    expected: Array | None,
    found: Array | None,
    first: str,
    other: str,
    budget: float,
) -> str | None:
    if expected is None or found is None:
        return f"{first if expected is None else other} did not give it"
    if not expected.size or expected.shape != found.shape:
        return f"shapes {expected.shape} and {found.shape}; expected two equal ones with data"
    figure = sqnr_db(expected.astype(np.float32), found.astype(np.float32))
    return f"{figure:.1f} dB in {other}; expected at least {budget:g}" if not figure >= budget else None
