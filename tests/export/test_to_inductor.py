from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from deploykit.errors import ExportError
from deploykit.export.to_inductor import to_inductor
from tests.conftest_graphs import engine_of, tiny_graph


def test_the_package_is_one_file_tied_to_this_processor():
    manifest, folder = engine_of("torch_compile")
    assert [path.name for path in folder.iterdir()] == ["model.pt2"]
    assert manifest.runtime_version == torch.__version__
    assert manifest.requires["cpu_capability"].startswith(torch.backends.cpu.get_cpu_capability())


def test_a_graph_without_a_program_is_refused(tmp_path: Path):
    with pytest.raises(ExportError, match="program"):
        to_inductor(dataclasses.replace(tiny_graph(), program=None), tmp_path)


def test_no_compiler_is_an_error_that_says_how_to_get_one(tmp_path: Path):
    from torch._inductor import config

    without = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(ExportError, match=r"C\+\+ compiler.*g\+\+"):
        to_inductor(tiny_graph(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_compilation_is_an_export_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise NotImplementedError("no lowering for aten.special")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(ExportError, match=r"aten\.special"):
        to_inductor(tiny_graph(), tmp_path)
    assert not list(tmp_path.iterdir())
