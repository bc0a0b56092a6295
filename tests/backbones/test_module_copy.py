"""Copies of module trees: what is copied, what is shared, and that the original stays as it is."""

import functools
import random
import threading
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from deploykit.backbones.module_copy import copy_module, detached, share, unwrapped

Pair = namedtuple("Pair", "first second")


class Net(nn.Module):
    """Tied weights, modules in plain containers, bound methods, and what cannot be copied."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.tied = nn.Conv2d(3, 3, 1)
        self.tied.weight = self.conv.weight
        self.norm = nn.BatchNorm2d(3)
        self.plain = {"conv": self.conv, "list": [self.norm, (self.tied,)], "pair": Pair(self.conv, 1)}
        self.offset = torch.ones(3, 1, 1, dtype=torch.float64)
        self.call = self.double
        self.partial = functools.partial(self.double, None)
        self.extras = [threading.Lock(), (each for each in ()), open(__file__)]  # noqa: SIM115, PTH123
        self.generators = [random.Random(0), np.random.default_rng(0), torch.Generator()]
        self.plain["itself"] = self.plain

    def double(self, images):
        return 2 * self.conv(images)

    def forward(self, images):
        return self.norm(self.tied(self.call(images))) + self.offset


@pytest.fixture
def net():
    made = Net()
    yield made
    made.extras[2].close()


def test_a_copy_has_the_tree_of_its_original_and_shares_what_cannot_be_copied(net):
    twin = copy_module(net, detached())
    assert type(twin) is Net
    assert twin.tied.weight is twin.conv.weight is not net.conv.weight
    assert twin.plain["conv"] is twin.conv is not net.conv
    assert twin.plain["list"] == [twin.norm, (twin.tied,)]
    assert twin.plain["pair"] == Pair(twin.conv, 1)
    assert twin.plain["itself"] is twin.plain is not net.plain
    assert twin.call.__self__ is twin.partial.func.__self__ is twin
    assert twin.extras is not net.extras
    assert all(map(lambda one, other: one is other, twin.extras, net.extras))
    assert not any(map(lambda one, other: one is other, twin.generators, net.generators))
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(twin.eval()(images), net.eval()(images))


def test_modes_tensors_and_hooks_of_the_original_stay(net):
    net.conv.register_forward_hook(lambda *_: None)
    twin = copy_module(net, detached()).eval()
    twin.conv._forward_hooks.clear()
    twin.requires_grad_(False)
    with torch.no_grad():
        twin.conv.weight.zero_()
        twin.norm.running_mean.fill_(7)
    assert net.training
    assert net.norm.training
    assert len(net.conv._forward_hooks) == 1
    assert net.conv.weight.requires_grad
    assert net.conv.weight.abs().sum() > 0
    assert net.norm.running_mean.sum() == 0


def test_a_sharing_copy_has_the_same_parameters_and_a_mode_of_its_own(net):
    twin = copy_module(net, share).eval()
    assert all(map(lambda one, other: one is other, twin.parameters(), net.parameters()))
    assert net.training
    assert not twin.training


def test_tensors_are_converted_wherever_they_are():
    net = Net().half()
    twin = copy_module(net, detached(torch.float32))
    net.extras[2].close()
    assert {tensor.dtype for tensor in twin.state_dict().values()} == {torch.float32, torch.int64}
    assert (twin.offset.dtype, net.offset.dtype, net.conv.weight.dtype) == (torch.float32, torch.float64, torch.half)


@pytest.mark.parametrize(
    "weight_norm",
    [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm],
)
def test_parametrized_layers_are_copied(weight_norm):
    layer = weight_norm(nn.Conv2d(3, 4, 3)).eval()
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(copy_module(layer, detached())(images), layer(images))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_a_hook_computes_is_copied():
    layer = torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    layer(torch.randn(1, 3, 8, 8))  # its weight is now within autograd, where deepcopy fails
    twin = copy_module(layer, detached())
    with torch.no_grad():
        twin.weight_g.mul_(2)
    images = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(twin(images) - twin.bias[:, None, None], 2 * (layer(images) - layer.bias[:, None, None]))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_wrappers_come_off_at_the_top_and_inside(net):
    inner = nn.Conv2d(3, 3, 1)
    assert unwrapped(nn.DataParallel(inner)) is inner
    assert unwrapped(torch.compile(nn.DataParallel(inner))) is inner
    twin = copy_module(nn.Sequential(torch.compile(inner), inner), detached())
    assert type(twin[0]) is nn.Conv2d
    assert twin[0] is twin[1]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_modules_are_copied_and_converted():
    twin = copy_module(nn.Sequential(torch.jit.script(nn.Conv2d(3, 4, 1))), detached(torch.float64))
    assert twin(torch.ones(1, 3, 2, 2, dtype=torch.float64)).dtype == torch.float64


class Holder:
    """A plain object that calls a module, as a head or a loss of a user's own does."""

    def __init__(self, norm):
        self.norm = norm
        self.lock = threading.Lock()

    def __call__(self, images):
        return self.norm(images)


def _by_closure(norm):
    def call(images):
        return norm(images)

    return call


def _by_default(norm):
    return lambda images, norm=norm: norm(images)


def _by_keyword(norm):
    def call(images, *, norm=norm):
        return norm(images)

    return call


def _by_wrapped_function(norm):
    @functools.wraps(norm.forward)
    def call(images):
        return inner(images)

    inner = _by_closure(norm)
    return call


def _by_list(norm):
    held = [norm]

    def call(images):
        return held[0](images)

    return call


ROUTES = [_by_closure, _by_default, _by_keyword, _by_wrapped_function, _by_list, Holder, lambda norm: Holder([norm])]


class Routed(nn.Module):
    """Calls its norm by a function or an object that reaches it."""

    def __init__(self, route):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.route = route(self.norm)

    def forward(self, images):
        norm = getattr(self.route, "norm", None)
        return norm[0](images) if isinstance(norm, list) else self.route(images)


@pytest.mark.parametrize("route", ROUTES)
def test_functions_and_objects_of_a_copy_reach_the_copy(route):
    net = Routed(route).train()
    images = torch.randn(2, 3, 4, 4)
    twin = copy_module(net, detached()).eval()
    expected = twin.norm(images)
    assert torch.equal(twin(images), expected)
    assert not net.norm.running_mean.any()
    assert net.norm.num_batches_tracked == 0


def test_a_hook_of_a_copy_keeps_what_it_sees_in_the_copy():
    net = nn.Sequential(nn.Conv2d(3, 3, 1))
    net.seen = {}
    net[0].register_forward_hook(lambda module, inputs, output: net.seen.update(last=output))
    twin = copy_module(net, detached())
    output = twin(torch.zeros(1, 3, 2, 2))
    assert twin.seen["last"] is output
    assert not net.seen


def test_functions_that_reach_nothing_are_shared():
    net = nn.Sequential(nn.Conv2d(3, 3, 1))
    factor = 2
    net.scale = lambda value: factor * value
    net.plain = lambda value, factor=2: factor * value

    def recursive(value):
        return recursive(value - 1) if value else net.scale(1)

    net.recursive = recursive
    twin = copy_module(net, detached())
    assert twin.scale is net.scale
    assert twin.plain is net.plain
    assert twin.recursive is not net.recursive
    assert twin.recursive(3) == 2


def test_a_hook_and_the_forward_of_a_class_share_what_both_reach():
    seen = []

    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
            self.first.register_forward_hook(lambda module, inputs, output: seen.append(output))

        def forward(self, images):
            self.last(self.first(images))
            return seen.pop()

    images, net = torch.randn(1, 3, 8, 8), Hooked().eval()
    torch.testing.assert_close(copy_module(net, detached())(images), net(images))
    assert not seen
