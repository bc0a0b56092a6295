"""Programs that torch's exporter is told to write as they are give what those give that it decomposes first."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploykit.export import to_onnx as module
from deploykit.export.to_onnx import to_onnx
from deploykit.export.undecomposed import KEPT, undecomposed
from deploykit.fusion.program import export_program
from deploykit.fusion.respell import RESPELLED
from deploykit.spec import BatchRange, InputSpec

SPEC = InputSpec(height=16, width=24)


class Everything(nn.Module):
    """Calls every operator of `KEPT`, some with unusual settings, and gives its images and one map twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.same = nn.Conv2d(3, 3, 3, padding=(2, 1), dilation=(2, 1), bias=False), nn.Conv2d(3, 3, 1)
        self.linear, self.norm, self.groups = nn.Linear(24, 6), nn.LayerNorm(24), nn.GroupNorm(3, 3)
        self.scale, self.slope = nn.Parameter(torch.ones(3, 1, 1)), nn.PReLU(3)
        self.register_buffer("shift", torch.ones(3, 1, 1))

    def forward(self, x):
        maps = self.same(self.same(x).relu()) + torch.add(x, x, alpha=2) + 1.5
        maps = F.relu6(F.hardswish(F.hardsigmoid(F.hardtanh(self.conv(maps), -1, 2)))) - self.shift
        maps = F.elu(F.silu(F.leaky_relu(self.slope(maps), 0.1))) * self.scale / 3
        maps = F.softplus(F.gelu(F.gelu(maps), approximate="tanh")).sigmoid().tanh().abs().sqrt()
        maps = self.groups(self.norm(F.max_pool2d(F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False), 3, 1, 1)))
        up = F.interpolate(F.interpolate(maps, scale_factor=2.0), size=(16, 24), mode="bilinear")
        up = F.pad(torch.cat([up[..., 1:], -up], 3)[..., :22], (1, 1, 0, 0), mode="reflect").clamp(-1, 3)
        one, two, three = self.linear(up).permute(0, 2, 3, 1).split(2, dim=2)
        tokens, _ = one.exp().softmax(-1).view(1, 16, 6).split([10, 6], dim=1)
        tokens = F.scaled_dot_product_attention(tokens, tokens, tokens)
        joined = torch.bmm(tokens, torch.matmul(tokens.transpose(1, 2), tokens)).unsqueeze(1)
        return x, maps, maps, joined, two.select(1, 0), three.amax((2, 3)), up.mean((2, 3), keepdim=True)


def written(program: torch.export.ExportedProgram, spec: InputSpec = SPEC) -> bytes:
    count = len(program.graph_signature.user_outputs)
    model = to_onnx(program, spec, [f"output{position}" for position in range(count)])
    return ir.to_proto(model).SerializeToString(deterministic=True)


def traced(network: nn.Module, spec: InputSpec = SPEC) -> torch.export.ExportedProgram:
    return export_program(network.eval().requires_grad_(False), spec)


def test_every_operator_gives_the_bytes_of_a_decomposed_program(monkeypatch):
    program = traced(Everything())
    assert {node.target for node in program.graph.nodes if node.op == "call_function"} == KEPT | {
        torch.ops.aten.view.default
    }
    code = program.graph_module.code
    found = written(program)
    assert program.graph_module.code == code, "the program stays what it was"
    monkeypatch.setattr(module, "undecomposed", lambda program: program)
    assert found == written(program)


class Reshapes(nn.Module):
    """Calls every operator of `RESPELLED`, of values that lie together and apart, beside what they become."""

    def forward(self, x):
        first, last = x.flatten(2).view(1, 3, -1, 24).chunk(2, dim=3)
        apart = first.permute(0, 2, 3, 1).reshape(1, -1, 3) + last[..., :9, :].narrow(3, 0, 12).narrow(2, 0, 1).sum()
        turned = x.transpose(1, 2).reshape(-1, 2, 36)
        one, _ = x.split([1, 2], dim=1)
        return apart, turned, x.reshape(1, 3, -1), x.chunk(1)[0], one.narrow(3, 2, 5), first[:, 1:], first.flatten(1)


def test_what_is_written_as_torch_decomposes_it_gives_the_same_bytes(monkeypatch):
    program = traced(Reshapes())
    calls = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert RESPELLED.keys() <= calls
    monkeypatch.setattr("deploykit.export.undecomposed.KEPT", KEPT | {torch.ops.aten.sum.default})
    assert undecomposed(program) is not program
    found = written(program)
    monkeypatch.setattr(module, "undecomposed", lambda program: program)
    assert found == written(program)


class Tokens(nn.Module):
    """Views of any batch, with what is counted in names between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 8)

    def forward(self, x):
        maps = self.conv(x)
        maps = maps + maps.relu()
        tokens = self.linear(maps.flatten(2).transpose(1, 2)) + 1
        apart = maps.permute(0, 2, 3, 1).reshape(-1, 24, 8)
        return tokens, apart * tokens, tokens.flatten(1), tokens.mean(1).view(-1, 2, 4)


def structure(data: bytes) -> list[object]:
    """Everything of a graph but its names: values are told by their place."""
    model = ir.from_proto(onnx.load_from_string(data))
    places: dict[str, int] = {}

    def place(value: ir.Value) -> object:
        constant = model.graph.initializers.get(value.name)
        return places.setdefault(value.name, len(places)) if constant is None else constant.const_value.tobytes()

    rows: list[object] = [
        (
            node.op_type,
            [value and place(value) for value in node.inputs],
            sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()),
            [(place(value), str(value.shape), value.dtype) for value in node.outputs],
        )
        for node in model.graph
    ]
    return [*rows, [(value.name, str(value.shape)) for value in model.graph.outputs]]


def test_a_dynamic_batch_gives_the_same_graph_but_for_its_names(monkeypatch):
    spec = InputSpec(batch=BatchRange(), height=16, width=24)
    program = traced(Tokens(), spec)
    assert undecomposed(program) is not program
    found = structure(written(program, spec))
    monkeypatch.setattr(module, "undecomposed", lambda program: program)
    assert found == structure(written(program, spec))


class Gathers(nn.Module):
    """Calls an operator that torch decomposes."""

    def forward(self, x):
        return (x.expand_as(x) + x.reshape(1, 3, 24, 16).sum(),)


class Counts(nn.Module):
    """Computes with the size of the batch."""

    def forward(self, x):
        return (x * x.shape[0],)


@pytest.mark.parametrize(("network", "batch"), [(Gathers(), 1), (Counts(), BatchRange())])
def test_what_torch_decomposes_is_left_to_it(network, batch):
    program = traced(network, InputSpec(batch=batch, height=16, width=24))
    assert undecomposed(program) is program
