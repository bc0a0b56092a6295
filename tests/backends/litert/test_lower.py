"""Torch program -> model.tflite: named ends, and what cannot be converted is refused before a file is written."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from deploykit import optional
from deploykit.backends import build_process
from deploykit.backends.conversion import load_module, write_request
from deploykit.backends.litert import lower as module
from deploykit.errors import ExportError, MissingDependency
from deploykit.fusion.program import export_program
from deploykit.optional import installed_version
from tests.conftest_graphs import engine_of, lower, manifest_of, open_engine, tiny_program


def test_the_signature_names_the_images_and_every_level():
    from ai_edge_litert.interpreter import Interpreter

    manifest, folder = engine_of("litert")
    interpreter = Interpreter(model_content=(folder / manifest.engine).read_bytes())
    (signature,) = interpreter.get_signature_list().values()
    assert signature["inputs"] == ["images"]
    assert sorted(signature["outputs"]) == ["stage1", "stem"]


def test_the_engine_has_the_versions_of_what_made_it(tmp_path: Path, monkeypatch):
    def written(conversion, request, graph):
        Path(request.engine).write_bytes(b"engine")

    monkeypatch.setattr(module, "run_converter", written)
    engine = lower("litert", tiny_program(), tmp_path)
    assert engine.runtime_version == installed_version("ai_edge_litert")
    assert engine.tools["litert-torch"] == installed_version("litert_torch")
    assert [file.name for file in tmp_path.iterdir()] == ["model.tflite"]


class _Spectrum(nn.Module):
    """Calls an operator that the converter does not have."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.special.bessel_j0(images),)


def test_an_operator_that_is_not_converted_is_named_and_nothing_is_written(tmp_path: Path):
    program = tiny_program(dynamic=False)
    outputs = (dataclasses.replace(program.outputs[0], shape=(1, 3, 32, 32)),)
    other = dataclasses.replace(program, outputs=outputs, program=export_program(_Spectrum(), program.input))
    with pytest.raises(ExportError, match=r"no aten.special_bessel_j0.default, .*test_lower.py:\d+.*another runtime"):
        lower("litert", other, tmp_path)
    assert list(tmp_path.iterdir()) == []


class _Biases(nn.Module):
    """Adds constants of one shape that lie in memory in another order than that of their elements."""

    def __init__(self) -> None:
        super().__init__()
        for index in range(3):
            values = torch.full((32, 32, 3), float(index)).permute(2, 0, 1)
            self.register_buffer(f"bias{index}", values, persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple((images + self.get_buffer(f"bias{index}")).relu() for index in range(3))


def test_constants_are_loaded_in_the_order_of_their_elements(tmp_path: Path):
    program = tiny_program(dynamic=False)
    other = dataclasses.replace(program, program=export_program(_Biases(), program.input))
    loaded = load_module(write_request(other, tmp_path, "engine"))
    biases = dict(loaded.named_buffers())
    assert all(values.is_contiguous() for values in biases.values())
    assert [float(biases[f"bias{index}"].mean()) for index in range(3)] == [0, 1, 2]


@pytest.mark.slow
def test_constants_of_one_shape_stay_apart(tmp_path: Path):
    program = tiny_program(dynamic=False)
    outputs = tuple(dataclasses.replace(program.outputs[0], name=f"o{i}", shape=(1, 3, 32, 32)) for i in range(3))
    other = dataclasses.replace(program, outputs=outputs, program=export_program(_Biases(), program.input))
    engine = lower("litert", other, tmp_path)
    with open_engine(manifest_of("litert", other, engine), tmp_path) as model:
        found = model._run(torch.zeros(1, 3, 32, 32).numpy())
    assert [float(each.mean()) for each in found] == [0, 1, 2]


@pytest.mark.parametrize(
    ("status", "message"), [(-11, "crashed.*signal 11.*last words"), (-9, "Out of memory"), (1, "failed.*last words")]
)
def test_a_converter_that_ends_without_an_answer_is_an_export_error(tmp_path: Path, monkeypatch, status, message):
    ended = subprocess.CompletedProcess([], status, stdout="", stderr="first\nlast words\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(ExportError, match=rf"(?s){message}"):
        lower("litert", tiny_program(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(build_process, "MOST_SECONDS", 0.05)
    with pytest.raises(ExportError, match=r"more than 0.05 s and was stopped"):
        lower("litert", tiny_program(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("absent", "package"), [("ai_edge_litert", "ai-edge-litert"), ("litert_torch", "litert-torch")]
)
def test_an_absent_package_has_its_command(tmp_path: Path, monkeypatch, absent, package):
    monkeypatch.setattr(optional, "installed_version", lambda name, package=None: None if name == absent else "1.0")
    with pytest.raises(MissingDependency, match=f"pip install {package}"):
        lower("litert", tiny_program(), tmp_path)
