"""Torch program -> model.pte: what cannot be converted is refused before a file is written."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from deploykit import optional
from deploykit.backends.conversion import lacks_operator
from deploykit.backends.executorch import lower as module
from deploykit.backends.executorch.inspect import left_in_float
from deploykit.backends.executorch.lower import CONVERSION
from deploykit.errors import ExportError, MissingDependency
from deploykit.fusion.program import export_program
from deploykit.optional import installed_version
from tests.conftest_graphs import engine_of, lower, tiny_program


def test_the_whole_network_is_one_call_of_the_delegate():
    manifest, folder = engine_of("executorch")
    assert left_in_float(folder / manifest.engine) == {"delegate calls": 1, "float convolution": 2}


def test_the_engine_has_the_versions_of_what_made_it_and_what_the_delegate_runs(tmp_path: Path, monkeypatch):
    manifest, folder = engine_of("executorch")
    content = (folder / manifest.engine).read_bytes()
    monkeypatch.setattr(module, "run_converter", lambda _, request, graph: Path(request.engine).write_bytes(content))
    engine = lower("executorch", tiny_program(), tmp_path)
    assert engine.compiler == {"delegate_calls": "1", "outside_the_delegate": "nothing"}
    assert engine.runtime_version == installed_version("executorch")
    assert engine.tools == {"torch": installed_version("torch")}
    assert [file.name for file in tmp_path.iterdir()] == ["model.pte"]


class _Spectrum(nn.Module):
    """Calls an operator that ExecuTorch does not have."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.special.bessel_j0(images),)


@pytest.mark.slow
def test_an_operator_that_is_not_converted_is_named_and_nothing_is_written(tmp_path: Path):
    program = tiny_program(dynamic=False)
    outputs = (dataclasses.replace(program.outputs[0], shape=(1, 3, 32, 32)),)
    other = dataclasses.replace(program, outputs=outputs, program=export_program(_Spectrum(), program.input))
    with pytest.raises(ExportError, match=r"no aten.special_bessel_j0.default, .*test_lower.py:\d+.*another runtime"):
        lower("executorch", other, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("RuntimeError: no kernel of aten::conv2d.out", r"no aten\.conv2d\.default, which the network calls \("),
        ("RuntimeError: Missing out variants: {'aten::roll'}", r"no aten\.roll, which the network calls\."),
        ("ValueError: words\nof its own", r"does not convert the network: ValueError: words of its own\."),
    ],
)
def test_the_exporters_words_name_the_operator(reason, message):
    assert re.search(message, str(CONVERSION.refusal(reason, tiny_program())))


def test_any_overload_of_an_operator_has_its_place():
    class Mean(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (images.mean((2, 3)),)

    program = tiny_program()
    other = dataclasses.replace(program, program=export_program(Mean(), program.input))
    for name in ("aten.mean", "aten.mean.dim"):
        assert re.search(r"no aten\.mean\.dim, .*test_lower\.py:\d+", str(lacks_operator("ExecuTorch", name, other)))
    assert "no aten.me, which the network calls." in str(lacks_operator("ExecuTorch", "aten.me", other))


def test_an_absent_package_has_its_command(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(optional, "installed_version", lambda name, package=None: None)
    with pytest.raises(MissingDependency, match="pip install executorch"):
        lower("executorch", tiny_program(), tmp_path)
