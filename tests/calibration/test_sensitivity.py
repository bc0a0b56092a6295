from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from deploykit.calibration.dialects import onnxruntime, openvino, tensorrt
from deploykit.calibration.dialects.qdq import QdqStyle, insert_qdq
from deploykit.calibration.plan import onnx_session
from deploykit.calibration.sensitivity import MEASURED_IMAGES, Sensitivity, Simulation, measure_sensitivity
from deploykit.errors import MissingDependency
from deploykit.parity.metrics import sqnr_db

PLAIN = QdqStyle(symmetric=False, all_writes=False, integer_bias=False, drop_activations=False, pointlike_weights=0)


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


@pytest.mark.parametrize("style", [PLAIN, replace(PLAIN, symmetric=True), replace(PLAIN, dynamic_products=True)])
@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_a_nodes_figure_is_that_of_the_graph_with_it_alone_in_q_dq(request, name, style):
    case = request.getfixturevalue(name)
    found = measure_sensitivity(case.graph.model, case.plan, case.images, style)
    expected = case.run()
    for entry in (found.nodes[0], found.nodes[len(found.nodes) // 2], found.nodes[-1]):
        rounded = as_written(insert_qdq(case.graph.model, only(case, [entry.node]), style), case.images)
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
    head = next(node.name for node in residual.graph.model.graph.node if node.op_type == "Gemm")
    assert found[head].sqnr_db["stage1"] > 100
    assert found[head].sqnr_db["logits"] < 70


def test_a_damaged_weight_is_found(residual):
    model = onnx.ModelProto()
    model.CopyFrom(residual.graph.model)
    name, use = list(residual.plan.placement.weights.items())[2]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == use.weight)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[:, 0, 0, 0] *= 100  # each channel's scale then leaves the other weights a few steps
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    assert measure_sensitivity(model, residual.plan, residual.images, PLAIN).nodes[0].node == name


def test_work_is_counted_in_multiply_accumulates(residual):
    found = {
        entry.node: entry
        for entry in measure_sensitivity(residual.graph.model, residual.plan, residual.images, PLAIN).nodes
    }
    first, *_, head = residual.plan.placement.weights
    assert found[first].macs == 3 * 7 * 7 * 16 * 32 * 32
    assert found[head].macs == 32 * 10


def test_every_runtimes_style_is_measured(tokens):
    figures = [
        measure_sensitivity(tokens.graph.model, tokens.plan, tokens.images, dialect.STYLE).together_db["logits"]
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
        with pytest.raises(MissingDependency, match=r"deploykit\[plot\]"):
            empty.plot(tmp_path / "plot.png")
    else:
        empty.plot(tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 0
