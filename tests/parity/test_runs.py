from __future__ import annotations

import numpy as np
import pytest

from deploykit.errors import ParityError
from deploykit.parity.runs import compare_runs

VALUES = {"a": np.ones(3, np.float32)}


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"one": VALUES}, "needs two runners; there is 1"),
        ({}, "there is 0: none"),
        ({"one": VALUES, "other": {}}, "a: other did not give it"),
        ({"one": {}, "other": VALUES}, "one gave no output; a: one did not give it"),
        ({"one": {}, "other": {}}, "one gave no output"),
        ({"one": {"a": np.ones(0)}, "other": {"a": np.ones(0)}}, "expected two equal ones with data"),
        ({"one": VALUES, "other": {"a": np.ones(4)}}, r"\(3,\) and \(4,\)"),
        ({"one": VALUES, "other": {"a": np.full(3, 2.0)}}, r"0\.0 dB in other; expected at least 40"),
        ({"one": VALUES, "other": {"a": np.full(3, np.nan)}}, "a: "),
    ],
)
def test_what_polygraphys_comparator_lets_pass_fails(runs, message: str):
    with pytest.raises(ParityError, match=message):
        compare_runs(runs, min_sqnr_db=40)


def test_equal_runs_pass():
    compare_runs({"one": VALUES, "other": {"a": VALUES["a"] * 1.0001}}, min_sqnr_db=40)
