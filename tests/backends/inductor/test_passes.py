from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import deploykit
from deploykit.backends.inductor.passes import DIALECT, _gather_rows
from deploykit.backends.onnxruntime.passes import DIALECT as ONNXRUNTIME
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.images import calibration_set
from deploykit.calibration.precision_plan import Bf16Plan
from deploykit.graph import TorchProgram
from deploykit.spec import Int8
from tests.backbones.realistic import randomize
from tests.calibration.networks import rounding_noise_db
from tests.conftest_graphs import sqnr_db
from tests.small_transformers import SHORT_VIT


def rendered(case, plan) -> TorchProgram:
    return DIALECT.render(case.program, plan, case.images).graph


def run_program(case, program: TorchProgram) -> list[np.ndarray]:
    module = program.program.module()
    with torch.no_grad():
        runs = [module(torch.from_numpy(image[None])) for image in case.images]
    return [np.concatenate([part.numpy() for part in parts]) for parts in zip(*runs, strict=True)]


@pytest.mark.parametrize("case", ["residual", pytest.param("lite0", marks=pytest.mark.slow)], indirect=True)
def test_the_program_gives_what_the_onnx_graph_gives(case):
    program = rendered(case, case.plan)
    expected = case.run()
    ours = rounding_noise_db(expected, run_program(case, program))
    # The ONNX graph also rounds residual adds, squeeze-and-excitation and what convolutions write for float nodes.
    whole = replace(ONNXRUNTIME, float_choices=())
    theirs = rounding_noise_db(expected, case.run(whole.render(case.graph, case.plan, case.images).graph.model))
    for name, one, other in zip([output.name for output in case.graph.outputs], ours, theirs, strict=True):
        assert one > other - 1, name
        assert one < other + 8, name


def test_the_master_program_stays_as_it_is(residual):
    before = run_program(residual, residual.program)
    rendered(residual, residual.plan)
    rendered(residual, HalfPlan(float_weights={}))
    for one, other in zip(before, run_program(residual, residual.program), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("plan", "least_db"),
    [(HalfPlan(float_weights={}), 45), (Bf16Plan(), 25), (None, 1000)],
    ids=["fp16", "bf16", "fp32"],
)
def test_other_precisions_give_float32_near_the_master(residual, plan, least_db):
    found = run_program(residual, rendered(residual, plan))
    assert {output.dtype for output in found} == {np.dtype(np.float32)}
    with np.errstate(divide="ignore"):
        assert (
            min(rounding_noise_db(residual.run() if plan else run_program(residual, residual.program), found))
            > least_db
        )


def test_weights_that_the_plan_keeps_stay_in_float32(residual):
    weights = (use.weight for use in residual.plan.placement.weights.values())
    kept = {name: 0.0 for name in weights if name.startswith("stem")}
    assert len(kept) == 1
    program = rendered(residual, HalfPlan(float_weights=kept)).program
    dtypes = [value.dtype for value in program.state_dict.values() if value.dim() == 4]
    assert dtypes.count(torch.float32) == 1
    assert set(dtypes) == {torch.float32, torch.float16}


def test_every_linear_layer_of_a_transformer_is_quantized(tokens):
    program = rendered(tokens, tokens.plan)
    kinds = [str(node.target) for node in program.program.graph.nodes]
    assert sum("dequantize_per_channel" in kind for kind in kinds) == len(tokens.plan.placement.weights) == 10
    assert min(rounding_noise_db(tokens.run(), run_program(tokens, program))) > 20


class ClassToken(torch.nn.Module):
    """The end of a ViT: one token of each image, and a residual linear over it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        token = tokens[:, :1]
        return token + self.linear(token)


@pytest.mark.parametrize(("batch", "copies"), [(1, 0), (2, 1), ("any", 1)])
def test_a_sum_reads_the_class_tokens_of_a_batch_from_one_block(batch, copies):
    tokens = torch.randn(2 if batch == "any" else batch, 5, 8)
    shapes = {"tokens": {0: torch.export.Dim("batch", min=1, max=8)}} if batch == "any" else None
    module = torch.export.export(ClassToken(), (tokens,), dynamic_shapes=shapes).module()
    expected = module(tokens)
    _gather_rows(module)
    module.recompile()
    assert [str(node.target) for node in module.graph.nodes].count("aten.clone.default") == copies
    torch.testing.assert_close(module(tokens), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_int8_of_a_vit_gives_a_batch_what_it_gives_each_image(photographs):
    torch.manual_seed(0)
    backbone = randomize(deploykit.create_backbone(SHORT_VIT, image_size=64)).eval()
    images = calibration_set(photographs, backbone.input_spec).sample(4)
    with torch.no_grad():
        expected = backbone(torch.from_numpy(images)).numpy()
    for batch in (1, 4):
        made = {"precision": Int8(min_sqnr_db=-100), "calibration": images, "batch_size": batch}
        with deploykit.create_backbone(backbone, runtime="torch_compile", **made) as engine:
            found = np.concatenate([engine(images[start : start + batch]) for start in range(0, 4, batch)])
        assert sqnr_db(expected, found) > 25, batch
