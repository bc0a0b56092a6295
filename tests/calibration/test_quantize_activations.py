from __future__ import annotations

import onnx_ir as ir
import pytest

from deploykit.calibration.dialect import OnnxDialect
from deploykit.calibration.quantize_activations import INT8, UINT8, quantize_activations, written_in_integers
from deploykit.calibration.tidy_graph import tidy_graph
from tests.calibration.networks import written


def pairs_of(model: ir.Model) -> dict[str, ir.Node]:
    """The QuantizeLinear of each tensor, by the tensor's name."""
    return {str(node.name).removesuffix("/quantize"): node for node in model.graph if node.op_type == "QuantizeLinear"}


@pytest.mark.parametrize("writes", [False, True])
def test_what_integer_kernels_write_for_float_nodes_is_rounded_where_that_is_asked_for(residual, writes):
    model = written(
        OnnxDialect(int8=(quantize_activations(UINT8, writes=writes), tidy_graph)), residual.graph, residual.plan
    )
    placement = residual.plan.placement
    alone = set(placement.writes) - set(placement.reads)
    assert alone
    assert set(placement.reads) <= pairs_of(model).keys()
    assert alone & pairs_of(model).keys() == (alone if writes else set())


@pytest.mark.parametrize(
    ("kind", "dtype"), [(UINT8, ir.DataType.UINT8), (INT8, ir.DataType.INT8)], ids=["uint8", "int8"]
)
def test_every_pair_has_the_type_and_the_range_of_its_tensor(residual, kind, dtype):
    model = written(OnnxDialect(int8=(quantize_activations(kind), tidy_graph)), residual.graph, residual.plan)
    for tensor, node in pairs_of(model).items():
        scale, zero_point = (operand.const_value for operand in node.inputs[1:])
        expected_scale, expected_zero = kind.parameters(residual.plan.range_of(tensor))
        assert zero_point.dtype == dtype
        assert (float(scale.numpy()), int(zero_point.numpy())) == (float(expected_scale), int(expected_zero))
        assert kind is UINT8 or not zero_point.numpy().any()


def test_an_output_that_integer_kernels_write_keeps_its_name_and_is_rounded(residual):
    assert "stage1" in written_in_integers(residual.plan.placement, between=False)
    model = written(OnnxDialect(int8=(quantize_activations(UINT8), tidy_graph)), residual.graph, residual.plan)
    assert [value.name for value in model.graph.outputs] == ["stage1", "stage2", "logits"]
    assert model.graph.outputs[0].producer().op_type == "DequantizeLinear"
