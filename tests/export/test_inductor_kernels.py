"""INT8 by the plan runs in integer kernels, as the code that inductor generated shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deploykit.calibration.dialects import inductor
from deploykit.calibration.sensitivity import style_of
from deploykit.export.graphs import select
from deploykit.export.inductor_kernels import integer_kernels, kernels_called, left_in_float
from deploykit.export.to_inductor import to_inductor
from deploykit.graph import Graph
from deploykit.runtimes.run_inductor import load_package
from tests.calibration.networks import Residual, Tokens, graph_of, plan_of, rounding_noise_db

IMAGES = np.random.default_rng(0).normal(size=(4, 3, 64, 64)).astype(np.float32)


def package_of(graph: Graph, folder: Path) -> Path:
    return folder / to_inductor(graph, folder).file


@pytest.mark.parametrize(
    ("network", "fused_sums"), [(Residual, 2), (Tokens, 0)], ids=["convolutions", "matrix products"]
)
def test_every_weight_of_the_plan_is_read_by_an_integer_kernel(network, fused_sums: int, tmp_path: Path):
    master = graph_of(network, IMAGES)
    plan = style_of("torch_compile").as_rendered(master.model, plan_of(master, IMAGES))
    package = package_of(select(inductor.render(master, plan), ("logits",)), tmp_path)
    assert integer_kernels(package) == len(plan.placement.weights)
    assert sum(left_in_float(package).values()) == len(plan.placement.float_nodes)
    assert kernels_called(package)["qconv2d_pointwise_binary"] == fused_sums
    found = load_package(package).run([torch.from_numpy(IMAGES[:1])])[0].numpy()
    with torch.no_grad():
        expected = master.program.module()(torch.from_numpy(IMAGES[:1]))[-1].numpy()
    assert rounding_noise_db([expected], [found])[0] > 20


def test_a_float_engine_has_no_integer_kernel(tmp_path: Path):
    package = package_of(select(graph_of(Residual, IMAGES), ("logits",)), tmp_path)
    assert integer_kernels(package) == 0
    assert set(left_in_float(package)) == {"float convolution", "float linear"}
