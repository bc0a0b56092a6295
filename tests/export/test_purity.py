"""Networks that do not give the same numbers twice are refused before any work, by operator and place."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploykit.backbones.user_module import wrap_module
from deploykit.errors import ExportError
from deploykit.export.trace import trace
from deploykit.spec import BatchRange, InputSpec

SPEC = InputSpec(height=16, width=16)


class Act(nn.Module):
    """Whatever ``act`` makes of a map."""

    def __init__(self, act, **parts):
        super().__init__()
        self.act = act
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, features):
        return self.act(self, features)


def network(act, **parts):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Act(act, **parts), nn.Conv2d(8, 4, 1))


def fixed_generator(part, features):
    return features + torch.rand(features.shape, generator=part.generator)


@pytest.mark.parametrize(
    ("operator", "act"),
    [
        ("aten.dropout", lambda part, features: F.dropout(features)),
        ("aten.feature_dropout", lambda part, features: F.dropout2d(features, 0.2, training=True)),
        ("aten.alpha_dropout", lambda part, features: F.alpha_dropout(features, 0.2, training=True)),
        ("aten.randn_like", lambda part, features: features + 0.1 * torch.randn_like(features)),
        ("aten.rand", lambda part, features: features * torch.rand(1)),
        ("aten.bernoulli", lambda part, features: features * torch.bernoulli(torch.full_like(features, 0.5))),
        ("aten.normal_", lambda part, features: features + torch.zeros_like(features).normal_()),
        ("aten.rrelu", lambda part, features: F.rrelu(features, training=True)),
        ("aten.randperm", lambda part, features: features[:, torch.randperm(8)]),
        ("aten.scaled_dot_product_attention", lambda part, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)),
    ],
)
def test_a_random_operator_is_named_with_its_place(operator, act):
    with pytest.raises(ExportError, match=rf"random in eval mode, by {operator}.* at '1' \(Act\), test_purity.py:\d+"):
        trace(wrap_module(network(act), 16), SPEC)


@pytest.mark.parametrize(
    "act",
    [
        lambda part, features: F.dropout(features, 0.0),
        lambda part, features: F.dropout(features, 1.0) + features,
        lambda part, features: F.rrelu(features),
        lambda part, features: F.scaled_dot_product_attention(features, features, features),
        lambda part, features: (torch.rand(3), features)[1],
        lambda part, features: features if random.random() < 2 else -features,
        lambda part, features: F.dropout(features, training=part.training),
    ],
)
def test_what_draws_nothing_that_counts_is_traced(act):
    state = random.getstate()
    program = trace(wrap_module(network(act).eval(), 16), SPEC)
    assert random.getstate() == state
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = network(act).eval()
        expected.load_state_dict({name.partition("module.")[2]: each for name, each in program.state_dict.items()})
        torch.testing.assert_close(program.module()(images)[0], expected(images))


@pytest.mark.parametrize(
    "act",
    [
        lambda part, features: features * (2 if random.random() < 0.3 else 1),
        lambda part, features: features * float(np.random.uniform()),
        lambda part, features: features * 2 if torch.rand(()) < 0.5 else features,
        lambda part, features: features + part.calls.add_(1),
    ],
)
def test_numbers_drawn_outside_the_graph_and_kept_states_are_named_with_their_place(act):
    module = network(act, calls=nn.Buffer(torch.zeros(1)))
    with pytest.raises(ExportError, match=r"does not give the same twice.*first inside '1'"):
        trace(wrap_module(module, 16), SPEC)
    assert float(module[1].calls) == 0


def test_a_generator_of_the_modules_own_stays_where_it_was():
    module = network(fixed_generator, generator=torch.Generator())
    before = module[1].generator.get_state()
    with pytest.raises(ExportError, match=r"aten\.rand\.generator"):
        trace(wrap_module(module, 16), SPEC)
    assert torch.equal(module[1].generator.get_state(), before)


def test_statistics_of_the_batch_are_named_with_their_place():
    module = network(lambda part, features: part.norm(features), norm=nn.BatchNorm2d(8, track_running_stats=False))
    with pytest.raises(ExportError, match=r"statistics of each batch.*aten\.batch_norm at '1\.norm' \(BatchNorm2d\)"):
        trace(wrap_module(module, 16), SPEC)


@pytest.mark.parametrize("batch", [3, BatchRange()])
@pytest.mark.parametrize(
    "act",
    [
        lambda part, features: features - 0.05 * features.mean(0, keepdim=True),
        lambda part, features: features - features[:1] + 1,
        lambda part, features: features + torch.arange(features.shape[0])[:, None, None, None],
        lambda part, features: features * features.shape[0],
    ],
    ids=["mean", "first", "position", "count"],
)
def test_what_mixes_the_images_of_a_batch_is_refused(act, batch):
    with pytest.raises(ExportError, match=r"depends on the others of its batch: image \d of \d has other outputs"):
        trace(wrap_module(network(act), 16), InputSpec(height=16, width=16, batch=batch))
    trace(wrap_module(network(act), 16), InputSpec(height=16, width=16, batch=1))


class StandardizedConv(nn.Conv2d):
    """A convolution of an NFNet, whose weight batch_norm standardizes as it is read; a tensor, where it is frozen."""

    def __init__(self, frozen: bool) -> None:
        super().__init__(3, 8, 3)
        if frozen:
            weight = self.weight.detach()
            del self.weight
            self.weight = weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(images, weight, self.bias, padding=1)


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_that_are_standardized_as_they_are_read_are_no_statistics_of_the_batch(frozen):
    module = nn.Sequential(StandardizedConv(frozen), nn.ReLU())
    traced = trace(wrap_module(module, 16), SPEC).module()
    image = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(traced(image)[-1], module(image))


def test_a_module_that_stays_in_training_mode_is_named():
    class Stubborn(nn.Sequential):
        def train(self, mode=True):
            return super().train(True)

    with pytest.raises(ExportError, match=r"aten\.dropout at '1\.drop' \(Dropout\)"):
        trace(wrap_module(Stubborn(*network(lambda part, x: part.drop(x), drop=nn.Dropout())), 16), SPEC)


def test_a_branch_on_values_is_named_with_its_line(capfd):
    module = network(lambda part, features: features * 2 if features.sum() > 0 else features)
    with pytest.raises(ExportError, match=r"cannot trace.*in '1' \(Act\), test_purity\.py:\d+: module = network"):
        trace(wrap_module(module, 16), SPEC)
    assert capfd.readouterr().err == ""
