"""Modules that are refused by the name of what is wrong with them."""

import warnings

import pytest
import torch
from torch import nn

from deploykit.backbones.module_checks import check_module, check_traceable
from deploykit.errors import SpecError


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own move to torchao
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4)), {nn.Linear})


class Two(nn.Conv2d):
    def forward(self, images, mask, scale=1):
        return super().forward(images) * mask * scale


class ByName(nn.Conv2d):
    def forward(self, *, pixel_values):
        return super().forward(pixel_values)


class Labelled(torch.Tensor):
    """A tensor of another kind, as quantizers and distributed training make them."""


def foreign():
    layer = nn.Conv2d(3, 4, 1)
    layer.bias = nn.Parameter(torch.zeros(4).as_subclass(Labelled))
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyLinear(3)), r"lazy layer.*1\.weight has no shape"),
        (nn.LazyBatchNorm2d, "lazy layer"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1, device="meta")), r"0\.weight: it is on the meta device"),
        (quantized, r"submodule '1' is a Linear.*floating point"),
        (lambda: nn.Sequential(torch.ao.quantization.FakeQuantize()), r"submodule '0' is a FakeQuantize"),
        (foreign, r"keeps bias as a .*Labelled"),
        (lambda: Two(3, 4, 1), r"takes 2 inputs \(images, mask\)"),
        (lambda: ByName(3, 4, 1), r"takes 1 inputs \(pixel_values\).*by position"),
        (nn.ReLU, "no parameters"),
    ],
)
def test_what_no_runtime_can_take_is_refused_by_name(make, message):
    with pytest.raises(SpecError, match=message):
        check_module(make(), "net")


def test_stubs_buffers_and_optional_inputs_are_no_fault():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(1))
            self.stub = torch.ao.quantization.QuantStub()

        def forward(self, images, mask=None, *rest, **settings):
            return images * self.scale

    check_module(Optional(), "net")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("make", [torch.jit.script, lambda part: torch.jit.trace(part, torch.zeros(1, 3, 4, 4))])
def test_torchscript_cannot_be_exported(make):
    whole = nn.Sequential(nn.Identity(), make(nn.Conv2d(3, 4, 1)))
    with pytest.raises(SpecError, match=r"submodule '1' is a TorchScript module \(Conv2d\)"):
        check_traceable(whole, "net")


def test_what_is_no_module_is_named():
    with pytest.raises(SpecError, match=r"net is a dict; expected a torch\.nn\.Module"):
        check_module({}, "net")


def test_a_forward_without_a_signature_is_taken():
    class Native(nn.Conv2d):
        forward = dict.fromkeys  # as written in C: it says nothing of what it takes

    check_module(Native(3, 4, 1), "net")
