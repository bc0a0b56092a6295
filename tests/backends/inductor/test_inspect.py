"""INT8 by the plan runs in integer kernels, as the code that inductor generated shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deploykit.backends.backend import LowerOptions
from deploykit.backends.inductor.adapter import load_package
from deploykit.backends.inductor.inspect import integer_kernels, kernels_called, left_in_float
from deploykit.backends.inductor.lower import lower
from deploykit.backends.inductor.passes import DIALECT
from deploykit.export.graphs import select
from deploykit.graph import TorchProgram
from tests.calibration.networks import Residual, Tokens, master_of, plan_of, rounding_noise_db

IMAGES = np.random.default_rng(0).normal(size=(4, 3, 64, 64)).astype(np.float32)


def package_of(program: TorchProgram, folder: Path) -> Path:
    return folder / lower(program, folder, LowerOptions()).file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "fused_sums"),
    [
        pytest.param(Residual, 2, id="convolutions"),
        pytest.param(Tokens, 0, id="matrix products"),
    ],
)
def test_every_weight_of_the_plan_is_read_by_an_integer_kernel(network, fused_sums: int, tmp_path: Path):
    master = master_of(network, IMAGES)
    plan = DIALECT.keep_float(master.onnx.model, plan_of(master.onnx, IMAGES))
    package = package_of(select(DIALECT.render(master.torch, plan, IMAGES).graph, ("logits",)), tmp_path)
    assert integer_kernels(package) == len(plan.placement.weights)
    assert sum(left_in_float(package).values()) == len(plan.placement.float_nodes)
    assert kernels_called(package)["qconv2d_pointwise_binary"] == fused_sums
    found = load_package(package).run([torch.from_numpy(IMAGES[:1])])[0].numpy()
    with torch.no_grad():
        expected = master.torch.program.module()(torch.from_numpy(IMAGES[:1]))[-1].numpy()
    assert rounding_noise_db([expected], [found])[0] > 20


@pytest.mark.slow
def test_a_float_engine_has_no_integer_kernel(tmp_path: Path):
    package = package_of(select(master_of(Residual, IMAGES).torch, ("logits",)), tmp_path)
    assert integer_kernels(package) == 0
    assert set(left_in_float(package)) == {"float convolution", "float linear"}


def test_a_release_of_0_1_0_is_read_as_todays():
    """Its FP32 engine, in which nothing runs in integers."""
    package = Path(__file__).parents[2] / "data" / "bundles-0.1.0" / "torch_compile-fp32" / "model.pt2"
    called = kernels_called(package)
    assert called
    assert integer_kernels(package) == 0
    found = left_in_float(package)
    assert found
    assert sum(found.values()) <= sum(called.values())
