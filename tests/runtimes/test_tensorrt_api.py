from __future__ import annotations

import subprocess
import sys
import types

import pytest

from deploykit.errors import DeployKitError, SpecError
from deploykit.runtimes import tensorrt_api as api


def test_importing_it_imports_no_torch_no_onnx_and_no_tensorrt():
    code = (
        "import sys; import deploykit.runtimes.tensorrt_api, deploykit.runtimes.tensorrt_builder;"
        "print([m for m in ('torch', 'onnx', 'onnx_ir', 'tensorrt_rtx', 'tensorrt') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_environment_names_a_flavour(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(api, "installed_flavours", lambda: api.FLAVOURS)
    assert api.default_flavour() == "tensorrt_rtx"
    monkeypatch.setenv(api.ENVIRONMENT, "tensorrt")
    assert api.default_flavour() == "tensorrt"
    monkeypatch.setenv(api.ENVIRONMENT, "tensorrt_llm")
    with pytest.raises(SpecError, match="DEPLOYKIT_TENSORRT is 'tensorrt_llm'"):
        api.default_flavour()


def test_the_installed_flavour_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(api.ENVIRONMENT, raising=False)
    monkeypatch.setattr(api, "installed_flavours", lambda: ("tensorrt",))
    assert api.default_flavour() == "tensorrt"
    monkeypatch.setattr(api, "installed_flavours", lambda: ())
    assert api.default_flavour() == "tensorrt_rtx"


def test_an_old_tensorrt_is_refused_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch):
    old = types.SimpleNamespace(__version__="8.6.1", Builder=object(), BuilderFlag=types.SimpleNamespace(TF32=0))
    monkeypatch.setattr(api, "require", lambda name: old)
    with pytest.raises(DeployKitError, match=r"tensorrt 8\.6\.1 lacks .*execute_async_v3.*10\.x"):
        api.load_tensorrt("tensorrt")


def test_what_is_needed_is_in_the_package_here():
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    assert api.load_tensorrt("tensorrt_rtx") is trt
    assert api.flavour_version("tensorrt_rtx") == trt.__version__


@pytest.fixture
def config():
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    return trt, builder, builder.create_builder_config()


def test_tf32_is_what_was_said(config):
    trt, _, settings = config
    for on in (True, False):
        api.set_tf32(trt, settings, on=on)
        assert settings.get_flag(trt.BuilderFlag.TF32) is on


def test_every_capability_in_the_table_is_one_that_the_package_has(config):
    trt, _, settings = config
    assert api.has_compute_capabilities(settings)
    assert all(api.set_capability(trt, settings, name) for name in api.RTX_CAPABILITIES)
    assert not api.set_capability(trt, settings, "sm87")


def test_what_a_package_lacks_is_named():
    bare = types.SimpleNamespace(BuilderFlag=types.SimpleNamespace())
    lacks = api.set_where_known(bare, object(), hardware="ampere_plus", version_compatible=False)
    assert lacks == "hardware compatibility 'ampere_plus'"
    assert api.set_where_known(bare, object(), hardware="none", version_compatible=True) == "version compatibility"
    assert api.set_where_known(bare, object(), hardware="none", version_compatible=False) is None
    assert not api.has_compute_capabilities(object())
