"""NNCF's SmoothQuant: its own factors, folded exactly into what writes each tensor, with no Mul left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from deploykit import create_backbone, export_backbone
from deploykit.backbones.attention import TransformerBlock
from deploykit.calibration.images import calibration_set
from deploykit.calibration.nncf_smoothquant import find_factors, smoothing_passes
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.recipes import with_recipe
from deploykit.export.to_onnx import to_onnx
from deploykit.fusion.pipeline import EXACT_DB, export_passes, fuse
from deploykit.fusion.program import export_program
from deploykit.onnx_values import floats_of
from deploykit.spec import Fp32, InputSpec, Int8
from tests.backbones.realistic import randomize
from tests.calibration.networks import SIDE, Residual, Windows
from tests.small_transformers import SHORT_VIT

pytest.importorskip("nncf", reason="nncf is not installed")
SPEC = InputSpec(height=SIDE, width=SIDE)
NNCF = with_recipe(Int8(recipe="nncf"), "of a user")


class Blocks(nn.Module):
    """Two transformer blocks: norms before two products each, two other products with nothing to take a factor in."""

    outputs = ("tokens", "logits")

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        self.blocks = nn.Sequential(TransformerBlock(48, 4), TransformerBlock(48, 4))
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)

    def forward(self, images):
        tokens = self.norm(self.blocks(self.patches(images).flatten(2).transpose(1, 2)))
        return tokens, self.head(tokens.mean(1))


@pytest.fixture(scope="module")
def images(photographs):
    return calibration_set(calibration_set(photographs, SPEC).sample(6), SPEC)


def program_of(network):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return export_program(randomize(network()).eval().requires_grad_(False), SPEC)


def fused(network, images, precision=NNCF):
    """The program after the passes of an export, with those of a precision."""

    def to_graph(module):
        return to_onnx(export_program(module, SPEC), SPEC, network.outputs)

    passes = smoothing_passes(precision, images, to_graph)
    return fuse(program_of(network), SPEC, images.sample(2), export_passes(*passes)), to_graph


@pytest.fixture(scope="module", params=[Blocks, Windows], ids=["blocks", "windows"])
def smoothed(request, images):
    plain, to_graph = fused(request.param, images, Fp32())
    program, _ = fused(request.param, images)
    before, after = (to_graph(each.program.module()) for each in (plain, program))
    return before, after, program.records, find_factors(before, images)


def test_factors_are_nncfs_and_no_mul_is_left(smoothed):
    before, after, records, found = smoothed
    assert len([node for node in after.graph if node.op_type == "Mul"]) <= len(
        [node for node in before.graph if node.op_type == "Mul"]
    )
    assert [node.op_type for node in after.graph] == [node.op_type for node in before.graph]
    folded = 0
    for each in found:
        (name,) = each.weights
        old, new = (floats_of(model.graph.initializers[name]) for model in (before, after))
        along = each.factors[:, None] if name.endswith(".T") else each.factors[None]
        if np.array_equal(old, new):
            continue
        np.testing.assert_allclose(new, old * along, rtol=1e-5)
        folded += 1
    counts = {record.name: record.rewrites for record in records}
    assert folded == counts["equalize-channels"] > 0
    assert counts["nncf-factors-left-out"] == len(found) - folded


def test_products_behind_a_gelu_or_softmax_and_a_norm_that_is_an_output_are_left_out(images):
    program, _ = fused(Blocks, images)
    counts = {record.name: record.rewrites for record in program.records}
    assert counts["equalize-channels"] == 4
    assert counts["nncf-factors-left-out"] >= 4


def test_the_network_computes_as_before(smoothed):
    _, _, records, _ = smoothed
    kept = {record.name: record.sqnr_db for record in records}
    assert kept["equalize-channels"] >= EXACT_DB


def test_a_network_without_attention_and_other_settings_have_none(images):
    program, _ = fused(Residual, images)
    assert {record.rewrites for record in program.records if record.name == "equalize-channels"} == {0}
    own = with_recipe(Int8(recipe="nncf", equalization=0.5), "of a user")
    for precision in (Fp32(), with_recipe(Int8(recipe="fast"), "of a user"), own):
        assert smoothing_passes(precision, images, program_of) == ()
    assert smoothing_passes(NNCF, None, program_of) == ()


@pytest.mark.slow
def test_an_export_of_a_transformer_is_smoothed(photographs, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = randomize(create_backbone(SHORT_VIT, num_classes=10)).eval()
    precision = Int8(recipe="nncf", calibrator="percentile")
    result = export_backbone(
        backbone, tmp_path / "bundle", runtime="openvino", precision=precision, calibration=photographs
    )
    assert result.status == "parity_checked"
    fusions = result.manifest.fusions
    assert fusions["equalize-channels"] == 7  # two norms of three blocks, and the last one before the head
    assert fusions["nncf-factors-left-out"] == 6
    assert QuantizationPlan.load(tmp_path / "bundle").calibrator == "nncf-percentile"
