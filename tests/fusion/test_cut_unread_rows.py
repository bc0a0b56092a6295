from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.cut_unread_rows import cut_unread_rows
from deploykit.fusion.drop_identities import drop_identities
from deploykit.fusion.pipeline import fuse
from deploykit.fusion.program import export_program
from deploykit.spec import InputSpec
from tests.fusion.graphs import (
    SPEC,
    Calls,
    calls,
    check_with_dynamic_batch,
    few,
    images,
    is_left_alone,
    layer_norm,
    rewrites,
    traced,
    vector,
)

WIDTH, HEADS, TOKENS = 12, 3, 48
attend = nn.functional.scaled_dot_product_attention


def chunked(qkv):
    return qkv.reshape(-1, TOKENS, 3 * HEADS, WIDTH // HEADS).transpose(1, 2).chunk(3, dim=1)


def unbound(qkv):
    return qkv.reshape(-1, TOKENS, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)


def spelled_out(query, key, value):
    return (query @ key.transpose(-2, -1)).softmax(dim=-1) @ value


def parts():
    return {
        "norm1": layer_norm(WIDTH, 1),
        "norm2": layer_norm(WIDTH, 2),
        "qkv": nn.Linear(WIDTH, 3 * WIDTH),
        "proj": nn.Linear(WIDTH, WIDTH),
        "fc1": nn.Linear(WIDTH, 20),
        "fc2": nn.Linear(20, WIDTH),
        "gamma": vector(WIDTH),
        "bias": torch.randn(1, HEADS, TOKENS, TOKENS),
        "head": nn.Linear(WIDTH, 5),
    }


def tokens_of(x):
    return x.reshape(-1, TOKENS, WIDTH)


def block(m, tokens, split=chunked, attention=attend):
    attended = attention(*split(m.qkv(m.norm1(tokens)))).transpose(1, 2).flatten(2)
    tokens = tokens + m.proj(attended) * m.gamma
    return tokens + m.fc2(nn.functional.gelu(m.fc1(m.norm2(tokens))))


def rows_of(graph, *targets):
    """The rows that each call of these operators gives, second to last axis."""
    found = [node for node in graph.graph.nodes if any(target in str(node.target) for target in targets)]
    return [node.meta["val"].shape[-2] for node in found]


CUTS = {
    "first": (lambda x: x[:, 0], 1),
    "last": (lambda x: x[:, -1], 1),
    "middle": (lambda x: x[:, 7:12], 5),
    "narrow": (lambda x: x[:, 3:4].flatten(1), 1),
    "class and distillation": (lambda x: x[:, 0] + x[:, 1], 2),
}


@few
@given(
    split=st.sampled_from([chunked, unbound]),
    attention=st.sampled_from([attend, spelled_out, "biased"]),
    cut=st.sampled_from(sorted(CUTS)),
    seed=st.integers(0, 99),
)
def test_a_block_of_which_few_tokens_are_read_computes_few(split, attention, cut, seed):
    taken, count = CUTS[cut]

    def function(m, x):
        biased = lambda q, k, v: attend(q, k, v, attn_mask=m.bias)  # noqa: E731
        return taken(block(m, block(m, tokens_of(x)), split, biased if attention == "biased" else attention))

    graph = traced(Calls(function, **parts()))
    assert rewrites(graph, cut_unread_rows, seed) >= 10
    assert rows_of(graph, "linear")[4:] == [TOKENS, count, count, count], "projections, then the MLP"
    assert rows_of(graph, "scaled_dot_product", "softmax")[-1] == count
    assert rewrites(graph, cut_unread_rows, seed) == 0


def test_what_another_output_reads_stays_whole_for_it_alone():
    def function(m, x):
        tokens = block(m, block(m, tokens_of(x)))
        return tokens.transpose(1, 2), m.head(tokens[:, 0])

    network = Calls(function, **parts())
    graph = traced(network)
    assert rewrites(graph, cut_unread_rows) == 11
    assert sorted(rows_of(graph, "linear")) == [1, 1, 1, 1] + [TOKENS] * 8, "keys and values are computed once"
    (output,) = graph.graph.find_nodes(op="output")
    output.args = ((output.args[0][1],),)
    drop_identities(graph)
    assert rows_of(graph, "linear")[5:] == [1, 1, 1, 1]
    assert calls(graph, "linear") == 9


def test_exports_cut_rows():
    network = Calls(lambda m, x: m.head(block(m, tokens_of(x))[:, 0]), **parts())
    record = fuse(export_program(network.eval(), SPEC), SPEC, images().numpy()).records[-1]
    assert (record.name, record.rewrites) == ("cut-unread-rows", 10), "the layer scale is folded before"
    assert record.sqnr_db > 150


def test_a_vit_of_timm_is_cut_too(timm):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    spec = InputSpec(height=32, width=32)
    program = export_program(Calls(lambda m, x: m.model(x), model=model).eval(), spec)
    fused = fuse(program, spec, torch.randn(1, 3, 32, 32).numpy())
    assert (fused.records[-1].name, fused.records[-1].rewrites) == ("cut-unread-rows", 11), "its last norm too"
    assert [rows for rows in rows_of(fused.program, "linear") if rows == 1] == [1] * 4, "last block, and the head"


def test_a_graph_of_any_batch_is_still_traced():
    module = Calls(lambda m, x: block(m, tokens_of(x))[:, 0], **parts())
    check_with_dynamic_batch(module, lambda graph: drop_identities(graph) and cut_unread_rows(graph))


def test_operands_that_are_the_same_for_all_rows_stay():
    def function(m, x):
        return (torch.matmul(tokens_of(x) * m.column, m.matrix) + m.row)[:, 5]

    constants = {"column": vector(TOKENS, 1), "matrix": vector(WIDTH, 7), "row": vector(7)}
    graph = traced(Calls(function, **constants))
    assert rewrites(graph, cut_unread_rows) == 3
    assert rows_of(graph, "matmul", "mul.Tensor", "add") == [1, 1, 1]


def _mean_beside_it(m, x):
    tokens = m.fc1(tokens_of(x))
    return tokens[:, 0] + tokens.mean(1)


def _more_than_half(m, x):
    return m.fc1(tokens_of(x))[:, : TOKENS // 2 + 1]


def _every_other(m, x):
    return m.fc1(tokens_of(x))[:, ::3]


def _none(m, x):
    return m.fc1(tokens_of(x))[:, 5:5].flatten(1)


def _two_axes(m, x):
    tokens = m.fc1(tokens_of(x))
    return tokens[:, 0], tokens[:, :, :2]


def _channels(m, x):
    return m.fc1(tokens_of(x))[:, :, :3]


def _normalized_over_tokens(m, x):
    return nn.functional.layer_norm(m.fc1(tokens_of(x)), (TOKENS, 20))[:, 0]


def _probabilities_over_tokens(m, x):
    return m.fc1(tokens_of(x)).softmax(1)[:, 0]


def _convolution(m, x):
    return m.conv(x)[:, :, 0]


def _split(m, x):
    return m.fc1(tokens_of(x)).chunk(2, dim=1)[0][:, 0]


def _windows(m, x):
    return m.fc1(tokens_of(x)).reshape(-1, 4, TOKENS // 4, 20)[:, :, 0]


def _no_layer(_, x):
    return (tokens_of(x).sigmoid() * 2)[:, 0]


def _causal(_, x):
    heads = x.reshape(-1, 4, 12, 12)
    return attend(heads, heads.relu(), heads, is_causal=True)[:, :, 3]


def _keys_are_queries(_, x):
    return attend(x, x, x.relu())[:, :, 3]


@pytest.mark.parametrize(
    "function",
    [
        _mean_beside_it,
        _more_than_half,
        _every_other,
        _none,
        _two_axes,
        _channels,
        _normalized_over_tokens,
        _probabilities_over_tokens,
        _convolution,
        _split,
        _windows,
        _no_layer,
        _causal,
        _keys_are_queries,
    ],
)
def test_near_misses_are_left_alone(function):
    assert is_left_alone(Calls(function, fc1=nn.Linear(WIDTH, 20), conv=nn.Conv2d(4, 4, 3)), cut_unread_rows)


def test_a_graph_that_writes_in_place_is_left_alone():
    def function(m, x):
        tokens = m.fc1(tokens_of(x))
        tokens[:, 1:] = 0
        return tokens[:, 0]

    assert is_left_alone(Calls(function, fc1=nn.Linear(WIDTH, 20)), cut_unread_rows)
