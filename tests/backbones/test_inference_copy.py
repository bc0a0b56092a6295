"""The copy that exports work on: FP32, eval mode, on the CPU, without hooks that only watch."""

import pytest
import torch
from torch import nn

from deploykit.backbones.inference_copy import inference_copy
from deploykit.backbones.user_module import wrap_module
from deploykit.errors import SpecError


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))


def outputs_of(backbone, images):
    with torch.no_grad():
        return list(backbone.forward_everything(images).values())


def test_the_copy_is_in_float32_and_eval_mode_and_the_original_is_untouched():
    module = Net().half().train()
    module[0].weight.grad = torch.ones_like(module[0].weight)
    module[1].weight.requires_grad_(False)
    module[0].register_full_backward_hook(lambda *_: None)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    twin = inference_copy(wrap_module(module, 16))
    assert {tensor.dtype for tensor in twin.parameters()} == {torch.float32}
    assert not any(part.training for part in twin.modules())
    assert not any(tensor.requires_grad for tensor in twin.parameters())
    assert not any(part._backward_hooks for part in twin.modules())
    assert all(part.training for part in module.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    assert [tensor.requires_grad for tensor in module.parameters()] == [True, True, False, True]
    assert module[0].weight.grad is not None
    assert len(module[0]._backward_hooks) == 1


def test_hooks_that_only_watch_are_dropped_and_others_kept():
    module, seen = Net(), []
    module[0].register_forward_hook(lambda part, inputs, output: seen.append(float(output.sum())))
    module[2].register_forward_hook(lambda part, inputs, output: output * 3)
    module[1].register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0].numpy().shape))
    twin = inference_copy(wrap_module(module, 16))
    inside = twin.module
    assert [len(part._forward_hooks) for part in inside] == [0, 0, 1, 0]
    assert len(inside[1]._forward_pre_hooks) == 0
    assert [len(part._forward_hooks) for part in module] == [1, 0, 1, 0]
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = module.eval()(images)
    torch.testing.assert_close(outputs_of(twin, images)[0], expected)


def test_a_hook_that_hands_a_map_to_the_forward_is_kept():
    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.more = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
            self.taken = {}
            self.conv.register_forward_hook(self.take)

        def take(self, part, inputs, output):
            self.taken["low"] = output

        def forward(self, images):
            high = self.more(self.conv(images))
            return {"low": self.taken.pop("low"), "high": high}

    module = Tapped()
    images = torch.randn(1, 3, 16, 16)
    found = outputs_of(inference_copy(wrap_module(module, 16)), images)
    with torch.no_grad():
        expected = module(images)
    for one, other in zip(found, expected.values(), strict=True):
        assert torch.equal(one, other)


def test_a_cast_inside_forward_is_refused_by_name():
    class Casting(nn.Conv2d):
        def forward(self, images):
            return super().forward(images.half())

    with pytest.raises(SpecError, match=r"casting computes in torch.float16.*leave casts such as x\.half\(\) out"):
        inference_copy(wrap_module(Casting(3, 4, 1).half(), 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_part_in_another_type_is_refused_by_that(dtype):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1).to(dtype)

        def forward(self, images):
            return self.second(self.first(images).to(dtype)).float()

    with pytest.raises(SpecError, match=f"mixed computes in .*{dtype} on cpu.*leave casts"):
        inference_copy(wrap_module(Mixed(), 8))
