from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deploykit.backends.backend import LowerOptions
from deploykit.backends.inductor.lower import lower
from deploykit.errors import ExportError
from tests.conftest_graphs import engine_of, tiny_program


def test_the_package_is_one_file_tied_to_this_processor():
    manifest, folder = engine_of("torch_compile")
    assert [path.name for path in folder.iterdir()] == ["model.pt2"]
    assert manifest.runtime_version == torch.__version__
    assert manifest.requires["cpu_capability"].startswith(torch.backends.cpu.get_cpu_capability())


def test_no_compiler_is_an_error_that_says_how_to_get_one(tmp_path: Path):
    from torch._inductor import config

    without = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(ExportError, match=r"C\+\+ compiler.*g\+\+"):
        lower(tiny_program(), tmp_path, LowerOptions())
    assert not list(tmp_path.iterdir())


def test_a_failed_compilation_is_an_export_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise NotImplementedError("no lowering for aten.special")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(ExportError, match=r"aten\.special"):
        lower(tiny_program(), tmp_path, LowerOptions())
    assert not list(tmp_path.iterdir())
