from __future__ import annotations

import getpass
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from deploykit.errors import ExportError
from deploykit.export.to_onnx import OPSET, to_onnx
from deploykit.fusion.program import export_program
from deploykit.onnx_session import onnx_session
from deploykit.spec import BatchRange, InputSpec


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 5)

    def forward(self, images):
        maps = self.convolution(images).relu()
        return maps, self.head(maps.mean((2, 3)))


@pytest.fixture(scope="module")
def module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Two().eval()


def exported(module, batch=1):
    spec = InputSpec(batch=batch, height=16, width=24)
    return to_onnx(export_program(module, spec), spec, ["maps", "logits"])


def test_names_opset_and_batch_are_those_asked_for(module):
    model = ir.to_proto(exported(module, BatchRange()))
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == ["maps", "logits"]
    assert {entry.version for entry in model.opset_import if entry.domain == ""} == {OPSET}
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert exported(module, 3).graph.inputs[0].shape[0] == 3


def test_the_graph_gives_the_modules_numbers(module):
    images = np.random.default_rng(0).normal(size=(3, 3, 16, 24)).astype(np.float32)
    found = onnx_session(exported(module, BatchRange())).run(None, {"images": images})
    with torch.no_grad():
        expected = module(torch.from_numpy(images))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-5)


def test_equal_exports_give_equal_bytes_that_name_no_machine(module):
    one, other = (ir.to_proto(exported(module)).SerializeToString(deterministic=True) for _ in range(2))
    assert one == other
    for secret in (os.sep + "tmp" + os.sep, str(Path.cwd()), torch.__path__[0], "site-packages"):
        assert secret.encode() not in one
    assert len(getpass.getuser()) < 4 or getpass.getuser().encode() not in one
    model = onnx.load_from_string(one)
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_an_operator_without_an_onnx_form_is_an_export_error():
    class Strange(nn.Module):
        def forward(self, images):
            return (torch.linalg.eigvals(images[0, 0, :16, :16]).real,)

    spec = InputSpec(height=16, width=24)
    with pytest.raises(ExportError, match="has no ONNX form"):
        to_onnx(export_program(Strange(), spec), spec, ["values"])
