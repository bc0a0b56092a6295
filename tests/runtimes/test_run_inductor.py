from __future__ import annotations

import dataclasses

import pytest

from deploykit.errors import DeviceUnavailable, IncompatibleEngine
from deploykit.runtimes.run_inductor import machine_tie
from tests.conftest_graphs import engine_of, open_engine


@pytest.mark.parametrize(("key", "value"), [("cpu_capability", "AVX1024"), ("machine", "riscv64")])
def test_a_package_for_another_processor_is_refused_before_it_is_loaded(key: str, value: str):
    manifest, folder = engine_of("torch_compile")
    other = dataclasses.replace(manifest, requires={**manifest.requires, key: value})
    with pytest.raises(IncompatibleEngine, match=f"{key} {value}.*{machine_tie()[key]}".replace("+", r"\+")):
        open_engine(other, folder)


def test_a_cpu_package_does_not_open_on_cuda():
    with pytest.raises(DeviceUnavailable, match="compiled for cpu and 'cuda'"):
        open_engine(*engine_of("torch_compile"), "cuda")
