from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.backbones.window_attention import WindowAttention, WindowGrid
from deploykit.backends.onnxruntime.fuse_attention import fuse_attention
from deploykit.backends.onnxruntime.passes import DIALECT
from deploykit.backends.openvino.separate_heads import separate_heads
from deploykit.backends.tensorrt.passes import DIALECT as TENSORRT
from deploykit.errors import FusionError
from deploykit.export.graphs import output_specs
from deploykit.export.to_onnx import to_onnx
from deploykit.fusion.onnx_passes import OnnxPass, run_onnx_passes
from deploykit.fusion.pipeline import EXACT_DB
from deploykit.fusion.program import export_program
from deploykit.graph import OnnxGraph
from deploykit.spec import BatchRange, InputSpec
from tests.fusion.graphs import DYNAMIC, SPEC, Calls, images
from tests.fusion.onnx_graphs import counts, fewer, is_left_alone, rewritten

PASSES = tuple(step for step in DIALECT.optimize if step.rewrite is fuse_attention)
HEADS, DEPTH, WIDTH = 2, 4, 8
attend = nn.functional.scaled_dot_product_attention


def ours(projected):
    return projected.reshape(-1, 4, 3 * HEADS, DEPTH).transpose(1, 2).chunk(3, dim=1)


def timms(projected):
    return projected.reshape(-1, 4, 3, HEADS, DEPTH).permute(2, 0, 3, 1, 4).unbind(0)


def interleaved(projected):
    parts = projected.reshape(-1, 4, HEADS, DEPTH, 3).permute(4, 0, 2, 1, 3)
    return parts[0], parts[1], parts[2]


def merge(attended):
    return attended.transpose(1, 2).reshape(-1, 4, WIDTH)


def network(attention, **parts) -> nn.Module:
    layers = {"qkv": nn.Linear(144, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH), **parts}
    return Calls(lambda m, x: m.proj(attention(m, m.qkv(x.flatten(2)))), **layers).eval()


def graph_of(module: nn.Module, spec: InputSpec = DYNAMIC) -> ir.Model:
    return to_onnx(export_program(module, spec), spec, ["logits"])


def graph_of_windows(grid: WindowGrid, heads: int, spec: InputSpec) -> ir.Model:
    """The attention of one Swin block over 6 x 6 tokens of 8 channels, between a norm and a residual."""
    torch.manual_seed(0)
    attention = WindowAttention(WIDTH, heads, grid)
    parts = {"embed": nn.Conv2d(4, WIDTH, 2, 2), "norm": nn.LayerNorm(WIDTH), "attention": attention}

    def block(m, x):
        tokens = m.embed(x).permute(0, 2, 3, 1)
        return tokens + m.attention(m.norm(tokens))

    return graph_of(Calls(block, **parts).eval(), spec)


@pytest.mark.parametrize(("layout", "scale", "spec"), [(ours, None, SPEC), (ours, 1.0, DYNAMIC), (timms, 0.3, DYNAMIC)])
def test_self_attention_becomes_the_runtimes_own_operator(layout, scale, spec):
    module = network(lambda _, projected: merge(attend(*layout(projected), scale=scale)))
    model, (record,) = run_onnx_passes(
        graph_of(module, spec), images(count=spec.batch if spec is SPEC else 2).numpy(), PASSES
    )
    assert record.rewrites == 1
    assert record.sqnr_db > EXACT_DB
    assert counts(model) == {"Reshape": 1, "Attention": 1, "MatMul": 1, "Add": 1}
    onnx.checker.check_model(ir.to_proto(model))


@pytest.mark.parametrize("shape", [(HEADS, 4, 4), (1, HEADS, 4, 4), (1, 1, 4, 4)])
def test_a_constant_position_bias_goes_along(shape):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    module = network(lambda m, projected: merge(attend(*ours(projected), m.bias)), bias=bias)
    model, (record,) = run_onnx_passes(graph_of(module), images(count=2).numpy(), PASSES)
    assert record.rewrites == 1
    assert counts(model)["Attention"] == 1


def _fewer_queries(_, projected):
    query, key, value = ours(projected)
    return attend(query[:, :, :1], key, value).transpose(1, 2).reshape(-1, 1, WIDTH)


def _normalized(_, projected):
    query, key, value = ours(projected)
    return merge(attend(nn.functional.layer_norm(query, (DEPTH,)), key, value))


def _computed_bias(_, projected):
    query, key, value = ours(projected)
    return merge((query @ key.mT + projected[:, None, :, :4]).softmax(-1) @ value)


def _heads_stay(_, projected):
    return attend(*ours(projected)).reshape(-1, 4, WIDTH)


def _also_read(_, projected):
    return merge(attend(*ours(projected)) * projected.mean())


@pytest.mark.parametrize(
    "attention",
    [
        lambda _, projected: merge(attend(*interleaved(projected))),
        _fewer_queries,
        _normalized,
        _computed_bias,
        _heads_stay,
        _also_read,
    ],
    ids=[
        "other rows",
        "fewer queries",
        "normalized queries",
        "computed bias",
        "heads are not merged",
        "computed after",
    ],
)
def test_near_misses_are_left_alone(attention):
    before = graph_of(network(attention))
    after, (record,) = run_onnx_passes(before, images(count=2).numpy(), PASSES)
    assert record.rewrites == 0
    assert after is before


@fewer
@given(shifted=st.booleans(), window=st.sampled_from([2, 3]), heads=st.sampled_from([1, 2]), batch=st.integers(1, 2))
def test_attention_in_windows_gathers_whole_tokens(shifted, window, heads, batch):
    spec = replace(SPEC, batch=batch)
    before = graph_of_windows(WindowGrid.fit((6, 6), window, shifted=shifted), heads, spec)
    written, after = rewritten(fuse_attention, before)
    assert written == 1
    assert (counts(after)["Attention"], counts(after)["Gather"]) == (1, 2)
    assert not {"Slice", "Concat", "Split", "Softmax"} & set(counts(after))
    written, after = rewritten(separate_heads, before)
    assert written == 1
    assert (counts(after)["Softmax"], counts(after)["Gather"], counts(after)["Split"]) == (1, 2, 0)


def test_windows_of_any_batch_share_one_bias_or_stay():
    plain = graph_of_windows(WindowGrid.fit((6, 6), 3, shifted=False), 2, DYNAMIC)
    masked = graph_of_windows(WindowGrid.fit((6, 6), 3, shifted=True), 2, DYNAMIC)
    for rewrite in (fuse_attention, separate_heads):
        assert rewritten(rewrite, plain)[0] == 1
        assert is_left_alone(rewrite, masked)


def test_windows_that_the_map_does_not_fill_keep_their_padding():
    before = graph_of_windows(WindowGrid.fit((6, 6), 4, shifted=False), 2, SPEC)
    written, after = rewritten(fuse_attention, before)
    assert (written, counts(after)["Pad"]) == (1, 1)


@pytest.mark.parametrize(("layout", "scale"), [(ours, None), (ours, 1.0), (timms, 0.3)])
@pytest.mark.parametrize("spec", [SPEC, DYNAMIC])
def test_heads_have_projections_of_their_own(layout, scale, spec):
    before = graph_of(network(lambda _, projected: merge(attend(*layout(projected), scale=scale))), spec)
    written, after = rewritten(separate_heads, before)
    assert written == 1
    assert (counts(after)["MatMul"], counts(after)["Split"], counts(after)["Mul"]) == (6, 0, 0)


def test_other_runtimes_get_the_graph_as_it_is():
    model = graph_of(network(lambda _, projected: merge(attend(*ours(projected)))))
    graph = OnnxGraph(
        input=InputSpec(batch=BatchRange(), channels=4, height=12, width=12), outputs=output_specs(model), model=model
    )
    assert TENSORRT.render(graph, None, images().numpy()).graph.model is model
    assert counts(DIALECT.render(graph, None, images().numpy()).graph.model)["Attention"] == 1
    assert "Attention" not in counts(model), "the graph of the other runtimes stays as it is"


def test_a_pass_that_changes_the_numbers_or_fails_is_named():
    def spoil(model):
        model.graph.initializers["proj.bias"].const_value = ir.tensor(np.full(WIDTH, 3, np.float32))
        return 1

    def fail(model):
        raise RuntimeError("no such node")

    model = graph_of(network(lambda _, projected: merge(attend(*ours(projected)))))
    for rewrite, message in ((spoil, "'it' changed the numbers.*promises 100"), (fail, "'it' failed: no such node")):
        step = OnnxPass(name="it", rewrite=rewrite, min_sqnr_db=EXACT_DB)
        with pytest.raises(FusionError, match=rf"{message}.*already run: onnxruntime-attention"):
            run_onnx_passes(model, images(count=2).numpy(), (*PASSES, step))
