"""A torch program in float16: near FP32, kept weights exact, integers the same ones."""

from __future__ import annotations

import torch

from deploykit.backends.coreml.passes import DIALECT
from deploykit.calibration.torch_half import cast_to_half
from deploykit.calibration.torch_integers import copy_of
from deploykit.parity.metrics import sqnr_db
from tests.calibration.conftest import Case


def outputs(module: torch.nn.Module, case: Case) -> list:
    with torch.no_grad():
        return [output.numpy() for output in module(torch.from_numpy(case.images[:1]))]


def test_a_program_in_half_precision_is_near_its_own(residual: Case):
    half = cast_to_half(copy_of(residual.program.program), ())
    for expected, found in zip(
        outputs(residual.program.program.module(), residual), outputs(half, residual), strict=True
    ):
        assert found.dtype == expected.dtype
        assert 40 < sqnr_db(expected, found) < 90


def test_kept_weights_stay_in_float32(residual: Case):
    half = cast_to_half(copy_of(residual.program.program), ("stem.0.weight",))
    kept = [name for name, value in half.named_parameters() if value.dtype == torch.float32]
    assert kept == ["inner.stem.0.weight", "inner.stem.0.bias"]


def test_integers_are_restored_to_half_precision(residual: Case):
    program = DIALECT.render(residual.program, residual.plan, residual.images).graph.program
    half = cast_to_half(copy_of(program), ())
    for expected, found in zip(outputs(program.module(), residual), outputs(half, residual), strict=True):
        assert sqnr_db(expected, found) > 25
