from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from deploykit.errors import ExportError, FusionError
from deploykit.fusion.pipeline import EXPORT_PASSES, FusionPass, fuse, run_passes
from deploykit.fusion.program import export_program
from deploykit.spec import BatchRange, InputSpec
from tests.fusion.graphs import SPEC, Calls, Tuple, calls, images, layer_norm, traced, vector
from tests.fusion.test_fold_batchnorm import FOLD, norm_of


def small() -> nn.Module:
    return Tuple(nn.Conv2d(4, 8, 3), norm_of(8), nn.ReLU()).eval()


def scale_weights(module) -> int:
    with torch.no_grad():
        getattr(module, "0").weight.mul_(1.01)
    return 1


def fail(module) -> int:
    raise RuntimeError("no such node")


def test_a_pass_that_changes_the_numbers_is_named_with_those_before_it():
    passes = (*FOLD, FusionPass(name="scale-weights", rewrite=scale_weights, min_sqnr_db=100))
    with pytest.raises(FusionError, match=r"'scale-weights' changed the numbers: \d.*dB.*promises 100.*fold-batchnorm"):
        run_passes(export_program(small(), SPEC).module(), images(), passes)


def test_a_pass_that_gives_nan_is_stopped():
    def spoil(module):
        with torch.no_grad():
            getattr(module, "0").bias.fill_(float("nan"))
        return 1

    with pytest.raises(FusionError, match="'spoil' changed the numbers"):
        run_passes(
            export_program(small(), SPEC).module(), images(), (FusionPass(name="spoil", rewrite=spoil, min_sqnr_db=1),)
        )


def test_a_pass_that_raises_is_named_with_those_before_it():
    first = FusionPass(name="nothing", rewrite=lambda module: 0, min_sqnr_db=100)
    with pytest.raises(FusionError, match=r"'fail' failed: no such node\. Passes already run: nothing\."):
        run_passes(
            export_program(small(), SPEC).module(),
            images(),
            (first, FusionPass(name="fail", rewrite=fail, min_sqnr_db=100)),
        )


def test_a_graph_that_does_not_run_is_an_export_error():
    class Mapped(nn.Conv2d):
        def forward(self, images):
            return (torch.vmap(lambda image: image * 2)(super().forward(images)),)

    with pytest.raises(ExportError, match=r"traced backbone does not run: .*torch\.vmap"):
        run_passes(export_program(Mapped(4, 8, 3).eval(), SPEC).module(), images(), ())


def test_a_small_change_within_the_promise_is_recorded():
    step = FusionPass(name="scale-weights", rewrite=scale_weights, min_sqnr_db=20)
    (record,) = run_passes(export_program(small(), SPEC).module(), images(), (step,))
    assert (record.name, record.rewrites) == ("scale-weights", 1)
    assert 20 < record.sqnr_db < 60


@pytest.mark.parametrize("batch", [1, 3, BatchRange()], ids=str)
def test_fusing_gives_a_program_that_still_takes_the_batch(batch):
    spec = InputSpec(batch=batch, channels=4, height=12, width=12)
    module = small()
    fused = fuse(export_program(module, spec), spec, images().numpy())
    assert [(record.name, record.rewrites) for record in fused.records if record.rewrites] == [("fold-batchnorm", 1)]
    for count in (batch,) if isinstance(batch, int) else (1, 3, 8):
        many = torch.cat([images(seed) for seed in range(count)])
        with torch.no_grad():
            (found,), (expected,) = fused.program.module()(many), module(many)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_module_that_cannot_be_traced_is_an_export_error():
    class Branching(nn.Module):
        def forward(self, inputs):
            return (inputs * 2 if inputs.sum() > 0 else inputs,)

    with pytest.raises(ExportError, match=r"cannot trace the backbone at \(1, 4, 12, 12\).*control flow"):
        export_program(Branching(), SPEC)


def test_records_name_each_pass_once():
    names = [step.name for step in EXPORT_PASSES]
    assert len(set(names)) == len(names)
    records = run_passes(traced(small()), images())
    assert [record.name for record in records] == names


class Block(nn.Module):
    """A transformer block as many people write it: separate projections, attention spelled out, dropout."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.first, self.second = layer_norm(8), layer_norm(8, seed=1)
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
        self.gamma = vector(8)
        self.drop = nn.Dropout(0.1)

    def heads(self, projected):
        return projected.view(projected.shape[0], -1, 2, 4).transpose(1, 2)

    def forward(self, inputs):
        stem = nn.functional.relu(self.norm(self.stem(nn.functional.pad(inputs, (1, 1, 1, 1)))), inplace=True)
        tokens = stem.flatten(2).transpose(1, 2)
        normed = self.first(tokens)
        query, key, value = (self.heads(layer(normed)) for layer in (self.query, self.key, self.value))
        weights = self.drop(torch.softmax(query @ key.transpose(-2, -1) / 2.0, dim=-1))
        attended = (weights @ value).transpose(1, 2).contiguous().view(tokens.shape)
        tokens = tokens + self.gamma * self.out(attended)
        return stem, tokens + self.drop(self.mlp(self.second(tokens)))


def test_a_users_own_block_is_fused_whole():
    module = Block().eval()
    spec = InputSpec(batch=BatchRange(), channels=4, height=12, width=12)
    fused = fuse(export_program(module, spec), spec, images().numpy())
    graph = fused.program.module()
    assert {record.name: record.rewrites for record in fused.records if record.name.startswith(("fo", "fu", "me"))} == {
        "fold-constants": 0,
        "fuse-attention": 1,
        "fold-batchnorm": 1,
        "fold-scale": 1,
        "merge-branches": 0,
        "fold-layernorm": 2,
        "fold-attention-scale": 1,
        "merge-linears": 2,
        "fold-pad": 1,
    }
    assert calls(graph, "linear") == 4
    assert calls(graph, "scaled_dot_product_attention") == 1
    assert (
        calls(
            graph, "batch_norm", "pad", "dropout", "mul", "div", "softmax", "matmul", "contiguous", "clone", "sym_size"
        )
        == 0
    )


def test_a_level_that_is_a_raw_convolution_is_the_same_after_it():
    def levels(m, x):
        raw = m.conv(x)
        return raw, m.norm(raw), m.other(raw * m.gamma)

    module = Calls(levels, conv=nn.Conv2d(4, 8, 3), norm=norm_of(8), other=nn.Conv2d(8, 4, 1), gamma=vector(8, 1, 1))
    graph = traced(module)
    with torch.no_grad():
        run_passes(graph, images())
        torch.testing.assert_close(graph(images())[0], module.conv(images()), rtol=0, atol=0)
    assert calls(graph, "batch_norm") == 1
    assert calls(graph, "mul") == 0


def test_a_constant_that_falls_to_another_side_in_double_is_folded():
    def sampled(m, x):
        turned = torch.tensor([[[0.9, 0.3, 0.1], [-0.2, 1.1, -0.1]]])
        grid = nn.functional.affine_grid(turned, (1, 4, 12, 12), align_corners=True)
        return nn.functional.grid_sample(m.conv(x), grid, mode="nearest", align_corners=True)

    graph = traced(Calls(sampled, conv=nn.Conv2d(4, 4, 1)))
    expected = graph(images())[0]
    records = run_passes(graph, images())
    assert next(record for record in records if record.name == "fold-constants").rewrites
    torch.testing.assert_close(graph(images())[0], expected)
