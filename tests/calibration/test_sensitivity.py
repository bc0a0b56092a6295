from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from deploykit.backends.onnxruntime import passes as onnxruntime
from deploykit.backends.onnxruntime.dynamic_products import DYNAMIC_OPERATORS, quantize_products
from deploykit.backends.onnxruntime.integer_attention import quantize_attentions
from deploykit.backends.openvino import passes as openvino
from deploykit.backends.tensorrt import passes as tensorrt
from deploykit.calibration.dialect import OnnxDialect
from deploykit.calibration.quantize_activations import INT8, UINT8, quantize_activations
from deploykit.calibration.quantize_weights import quantize_weights
from deploykit.calibration.sensitivity import MEASURED_IMAGES, Sensitivity, Simulation, measure_sensitivity
from deploykit.calibration.tidy_graph import tidy_graph
from deploykit.errors import MissingDependency
from deploykit.onnx_session import onnx_session
from deploykit.parity.metrics import sqnr_db
from tests.calibration.networks import written


def dialect_of(activations=UINT8) -> OnnxDialect:
    """Q/DQ pairs on weights and on what integer kernels read, for every node of the plan."""
    passes = (quantize_weights(integer_bias=False), quantize_activations(activations), tidy_graph)
    return OnnxDialect(int8=passes, activations=activations)


PLAIN = dialect_of()
DYNAMIC = OnnxDialect(
    int8=(
        quantize_attentions,
        quantize_weights(integer_bias=False, dynamic_operators=DYNAMIC_OPERATORS),
        quantize_products,
        quantize_activations(UINT8),
        tidy_graph,
    ),
    dynamic_operators=DYNAMIC_OPERATORS,
)


def only(case, nodes):
    """The plan with these nodes alone in integers, and nothing else."""
    kept = {name: use for name, use in case.plan.placement.weights.items() if name in nodes}
    reads = tuple(dict.fromkeys(use.input for use in kept.values()))
    placement = replace(case.plan.placement, weights=kept, reads=reads, writes=(), between=())
    return replace(case.plan, placement=placement)


def as_written(model, images):
    session = onnx_session(model, optimize=False)  # whose optimizer fails on an int8 Gemm
    runs = [session.run(None, {"images": image[None]}) for image in images]
    return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


@pytest.mark.parametrize("dialect", [PLAIN, dialect_of(INT8), DYNAMIC], ids=["uint8", "int8", "dynamic"])
@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_a_nodes_figure_is_that_of_the_graph_with_it_alone_in_q_dq(request, name, dialect):
    case = request.getfixturevalue(name)
    found = measure_sensitivity(case.graph.model, case.plan, case.images, dialect)
    expected = case.run()
    for entry in (found.nodes[0], found.nodes[len(found.nodes) // 2], found.nodes[-1]):
        rounded = as_written(written(dialect, case.graph, only(case, [entry.node])), case.images)
        for output, before, after in zip(case.graph.outputs, expected, rounded, strict=True):
            figure = sqnr_db(before[:MEASURED_IMAGES], after[:MEASURED_IMAGES])
            if figure < 100:  # an output before the node is exact but for the order of additions
                assert entry.sqnr_db[output.name] == pytest.approx(figure, abs=0.15)


def test_nodes_are_sorted_by_their_worst_output_and_shares_sum_to_one(residual):
    found = measure_sensitivity(residual.graph.model, residual.plan, residual.images, PLAIN)
    worst = [entry.worst_db for entry in found.nodes]
    assert worst == sorted(worst)
    assert {entry.node for entry in found.nodes} == residual.plan.placement.weights.keys()
    assert sum(found.shares().values()) == pytest.approx(1)
    assert found.images == MEASURED_IMAGES


def test_noise_of_single_nodes_adds_up_to_about_that_of_all(residual):
    found = measure_sensitivity(residual.graph.model, residual.plan, residual.images, PLAIN)
    summed = -10 * np.log10(sum(10 ** (-entry.sqnr_db["logits"] / 10) for entry in found.nodes))
    assert summed == pytest.approx(found.together_db["logits"], abs=3)


def test_a_node_does_not_disturb_the_outputs_before_it(residual):
    found = {
        entry.node: entry
        for entry in measure_sensitivity(residual.graph.model, residual.plan, residual.images, PLAIN).nodes
    }
    head = next(node.name for node in residual.graph.model.graph if node.op_type == "Gemm")
    assert found[head].sqnr_db["stage1"] > 100
    assert found[head].sqnr_db["logits"] < 70


def test_a_damaged_weight_is_found(residual):
    model = residual.graph.model.clone()
    name, use = list(residual.plan.placement.weights.items())[2]
    weight = model.graph.initializers[use.weight]
    values = weight.const_value.numpy().copy()
    values[:, 0, 0, 0] *= 100  # each channel's scale then leaves the other weights a few steps
    weight.const_value = ir.tensor(values, name=use.weight)
    assert measure_sensitivity(model, residual.plan, residual.images, PLAIN).nodes[0].node == name


def test_work_is_counted_in_multiply_accumulates(residual):
    found = {
        entry.node: entry
        for entry in measure_sensitivity(residual.graph.model, residual.plan, residual.images, PLAIN).nodes
    }
    first, *_, head = residual.plan.placement.weights
    assert found[first].macs == 3 * 7 * 7 * 16 * 32 * 32
    assert found[head].macs == 32 * 10


def test_every_runtimes_dialect_is_measured(tokens):
    figures = [
        measure_sensitivity(tokens.graph.model, tokens.plan, tokens.images, dialect.DIALECT).together_db["logits"]
        for dialect in (onnxruntime, openvino, tensorrt)
    ]
    assert len(set(figures)) == 3
    assert min(figures) > 10


def test_any_set_of_nodes_can_be_simulated(residual):
    simulation = Simulation(residual.graph.model, residual.plan, residual.images, PLAIN)
    nodes = list(residual.plan.placement.weights)
    none, some, everything = (simulation.sqnr_db(chosen)["logits"] for chosen in ((), nodes[:3], nodes))
    assert none == 300
    assert none > some > everything


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path):
    empty = Sensitivity(images=1, nodes=(), together_db={})
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependency, match="pip install matplotlib"):
            empty.plot(tmp_path / "plot.png")
    else:
        empty.plot(tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 0
