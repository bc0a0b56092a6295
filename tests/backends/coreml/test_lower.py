"""Torch program -> model.mlpackage: what cannot be converted is refused before a file is written."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from deploykit import optional
from deploykit.backends.coreml.lower import CONVERSION
from deploykit.backends.coreml.package import PACKAGE_FOLDER
from deploykit.errors import ExportError, MissingDependency
from deploykit.fusion.program import export_program
from deploykit.graph import TorchProgram
from deploykit.manifest import engine_parts
from deploykit.optional import installed_version
from deploykit.spec import InputSpec, TensorSpec
from tests.conftest_graphs import engine_of, lower, tiny_program


class _Spectrum(nn.Module):
    """Calls an operator that the converter does not have."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.special.bessel_j0(images),)


class _Regions(nn.Module):
    """Adds to a tensor of six dimensions."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        regions = images.view(1, 3, 4, 8, 4, 8)
        return ((regions + regions.mean((3, 5), keepdim=True)).reshape(1, 3, 32, 32),)


def program_of(network: nn.Module) -> TorchProgram:
    spec = InputSpec(height=32, width=32)
    outputs = (TensorSpec(name="stem", shape=(1, 3, 32, 32)),)
    return TorchProgram(input=spec, outputs=outputs, program=export_program(network, spec))


def test_the_manifest_of_the_package_names_its_files(residual_package):
    package, folder = residual_package.path, residual_package.folder
    said = json.loads((package / "Manifest.json").read_text())
    paths = [entry["path"] for entry in said["itemInfoEntries"].values()]
    assert paths == ["com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"]
    assert all((package / "Data" / path).exists() for path in paths)
    assert said["itemInfoEntries"][said["rootModelIdentifier"]]["name"] == "model.mlmodel"
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted(engine_parts(residual_package.manifest.engine, files)) == sorted(files)
    assert len(files) == 3


@pytest.mark.slow
def test_two_conversions_give_the_same_bytes(tmp_path: Path):
    _, folder = engine_of("coreml")
    lower("coreml", tiny_program(), tmp_path)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name


def test_the_engine_has_the_versions_of_what_made_it(residual_package):
    engine = residual_package.engine
    assert engine.runtime_version == installed_version("coremltools")
    assert engine.tools["torch"] == installed_version("torch")
    assert [file.name for file in residual_package.folder.iterdir()] == [PACKAGE_FOLDER]


@pytest.mark.parametrize(
    "reason",
    [
        "NotImplementedError: Unsupported fx node special_bessel_j0, kind special_bessel_j0",
        "NotImplementedError: PyTorch convert function for op 'special_bessel_j0' not implemented.",
    ],
)
def test_the_converters_words_name_the_operator(reason):
    error = CONVERSION.refusal(reason, program_of(_Spectrum()))
    assert re.search(r"no aten.special_bessel_j0.default, .*test_lower.py:\d+.*another runtime", str(error))


@pytest.mark.slow
def test_an_operator_that_is_not_converted_is_named_and_nothing_is_written(tmp_path: Path):
    with pytest.raises(ExportError, match=r"no aten.special_bessel_j0.default, .*test_lower.py:\d+.*another runtime"):
        lower("coreml", program_of(_Spectrum()), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_six_dimensions_is_named_and_nothing_is_written(tmp_path: Path):
    with pytest.raises(ExportError, match=r"at most 5.*aten.mean.dim .*test_lower.py:\d+.*has one of 6"):
        lower("coreml", program_of(_Regions()), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_converter_that_crashes_is_an_export_error(tmp_path: Path, monkeypatch):
    ended = subprocess.CompletedProcess([], -11, stdout="", stderr="first\nlast words\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(ExportError, match=r"(?s)conversion to Core ML crashed.*signal 11.*last words"):
        lower("coreml", program_of(nn.ReLU6()), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_absent_package_has_its_command(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(optional, "installed_version", lambda name, package=None: None)
    with pytest.raises(MissingDependency, match="pip install coremltools"):
        lower("coreml", program_of(nn.ReLU6()), tmp_path)
