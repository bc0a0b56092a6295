from __future__ import annotations

from dataclasses import replace

import onnx
import onnx_ir as ir
import pytest

from deploykit.backends.onnxruntime.dynamic_products import DYNAMIC_OPERATORS, quantize_products
from deploykit.backends.onnxruntime.integer_attention import quantize_attentions
from deploykit.backends.onnxruntime.integer_gates import clip_gate_ranges, fold_hard_sigmoids, split_gates
from deploykit.backends.onnxruntime.pad_channels import pad_channels
from deploykit.backends.onnxruntime.passes import DIALECT
from deploykit.calibration.dialect import OnnxDialect
from deploykit.calibration.drop_activations import drop_activations
from deploykit.calibration.float_fallback import keep_pointlike
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.precision_plan import Bf16Plan
from deploykit.calibration.quantize_activations import UINT8, quantize_activations
from deploykit.calibration.quantize_weights import quantize_weights
from deploykit.calibration.tidy_graph import tidy_graph
from tests.calibration.networks import rounding_noise_db, written


def passes_of(*, integer_bias: bool, writes: bool) -> OnnxDialect:
    """ONNX Runtime's passes with these choices, and nothing kept in float at the image's side."""
    return OnnxDialect(
        int8=(
            pad_channels,
            quantize_attentions,
            fold_hard_sigmoids,
            quantize_weights(integer_bias=integer_bias, dynamic_operators=DYNAMIC_OPERATORS),
            quantize_products,
            split_gates,
            clip_gate_ranges,
            quantize_activations(UINT8, writes=writes, between=True),
            drop_activations(between=True),
            tidy_graph,
        )
    )


def bytes_of(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("integer_bias", [False, True])
def test_every_choice_of_passes_gives_a_valid_graph_near_fp32(residual, integer_bias, writes):
    model = written(passes_of(integer_bias=integer_bias, writes=writes), residual.graph, residual.plan)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert [output.name for output in proto.graph.output] == ["stage1", "stage2", "logits"]
    assert min(rounding_noise_db(residual.run(), residual.run(model))) > 15
    biases = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT32]
    assert bool(biases) == integer_bias


@pytest.mark.parametrize("of", ["int8", "fp16"])
def test_the_master_stays_as_it_is(residual, of):
    before = bytes_of(residual.graph.model)
    DIALECT.render(residual.graph, residual.plan if of == "int8" else HalfPlan(float_weights={}), residual.images)
    assert bytes_of(residual.graph.model) == before


def test_without_passes_a_graph_in_float_is_the_master(residual):
    for plan in (None, Bf16Plan()):  # BF16 is what the adapter computes in
        rendered = OnnxDialect().render(residual.graph, plan, residual.images)
        assert rendered.graph.model is residual.graph.model
        assert rendered.records == ()


def test_a_pass_goes_by_the_plan_that_the_one_before_it_returns(residual):
    seen = []

    def shifted(model, plan):
        return replace(plan, bias_shift={})

    def look(model, plan):
        seen.append(plan.bias_shift)
        return plan

    written(OnnxDialect(int8=(look, shifted, look)), residual.graph, residual.plan)
    assert seen == [residual.plan.bias_shift, {}]


def test_a_plan_whose_rest_is_in_half_precision_gives_a_graph_in_half_precision(residual):
    dialect = OnnxDialect(int8=(quantize_weights(integer_bias=False), tidy_graph), float_choices=(keep_pointlike(),))
    for float_dtype, expected in (("fp32", ir.DataType.FLOAT), ("fp16", ir.DataType.FLOAT16)):
        plan = replace(residual.plan, float_dtype=float_dtype)
        model = written(dialect, residual.graph, plan)
        kept = dialect.keep_float(residual.graph.model, plan).placement.float_nodes
        weights = {node.inputs[1].dtype for node in model.graph if node.name in kept}
        assert weights == {expected}
        assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT] * 3
