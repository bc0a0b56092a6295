"""Programs that write in place, or hold regions, against what they become."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploykit.backbones.user_module import wrap_module
from deploykit.errors import ExportError
from deploykit.export.trace import trace
from deploykit.fusion.drop_identities import mutates
from deploykit.spec import BatchRange, InputSpec


class Net(nn.Module):
    """Convolution, BatchNorm, and whatever ``act`` makes of the map."""

    def __init__(self, act):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.act = act

    def forward(self, images):
        return self.act(self, images, self.norm(self.conv(images)))


def write_part(net, images, features):
    features[:, :4] *= 3
    features[:, 4:, 0] = 1
    return features


def through_a_view(net, images, features):
    view = features.flatten(2)
    view.sub_(1)
    return F.hardswish(features, inplace=True)


def input_in_place(net, images, features):
    images.sub_(0.5).div_(0.25)
    return net.conv(images)


def count(net, images, features):
    net.calls += 1
    return features.relu_()


def region(manager):
    def act(net, images, features):
        with manager():
            inside = net.last(features).relu()
        return inside + features

    return act


def nested(net, images, features):
    with torch.enable_grad(), torch.autocast("cuda"):
        return net.last(features)


ACTS = [
    write_part,
    through_a_view,
    input_in_place,
    count,
    region(torch.no_grad),
    region(torch.enable_grad),
    region(torch.inference_mode),
    region(lambda: torch.autocast("cuda")),
    region(lambda: torch.autocast("cpu", enabled=False)),
    nested,
]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(
    ("batch", "act"),
    [*((1, act) for act in ACTS), *((BatchRange(), act) for act in (write_part, input_in_place, nested))],
)
def test_the_program_gives_the_same_and_writes_nothing(batch, act):
    module = Net(act).eval()
    program = trace(wrap_module(module, 16), InputSpec(batch=batch, height=16, width=16))
    assert not any(mutates(node) for node in program.graph.nodes)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any(target.startswith("wrap_with") or "_no_training" in target for target in targets)
    images = torch.randn(1 if batch == 1 else 3, 3, 16, 16)
    kept = images.clone()
    found = program.module()(images)[0]
    assert torch.equal(images, kept)
    with torch.no_grad():
        torch.testing.assert_close(found, module(kept))


def test_autocast_that_counts_is_refused():
    def act(net, images, features):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net.last(features).float()

    with pytest.raises(ExportError, match=r"bfloat16 within its own autocast region.*leave torch.autocast out"):
        trace(wrap_module(Net(act), 16), InputSpec(height=16, width=16))
