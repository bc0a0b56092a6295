"""Every family in the runtimes for phones and boards: FP32 to rounding, and INT8 as the plan gives it elsewhere.

Numbers are held against the same network in double precision: another runtime's float32 has rounding of its own. Of
MobileNetV2 at 64 pixels with these weights, each of torch, ONNX Runtime, LiteRT and ExecuTorch keeps 91.5 to 93.1 dB of
the fourth stage, and ONNX Runtime and LiteRT 89.8 of each other.
"""

from __future__ import annotations

import pytest

from tests.backbones.smallest import SMALLEST
from tests.backends.integer_engine import integer_engine, losses
from tests.backends.phone_families import family_case, float_engine
from tests.calibration.conftest import Case
from tests.conftest_graphs import sqnr_db

RUNTIMES = ("litert", "executorch")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=SMALLEST)
def family(request, photographs) -> tuple[str, Case]:
    """The smallest network of a family, its plan and its images."""
    return request.param, family_case(request.param, photographs)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_level_keeps_90_db_in_fp32(runtime, family):
    name, case = family
    _, found = float_engine(runtime, case, name)
    kept = [sqnr_db(expected, own) for expected, own in zip(case.exact(), found, strict=True)]
    assert min(kept) >= 90, kept


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_level_of_int8_is_within_1_db_of_the_same_plan(runtime, family):
    name, case = family
    behind = losses(integer_engine(runtime, case, name))
    assert max(behind) <= 1, behind
