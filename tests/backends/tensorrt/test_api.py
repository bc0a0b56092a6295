from __future__ import annotations

import subprocess
import sys
import types

import pytest

from deploykit.backends.tensorrt import api
from deploykit.errors import DeployKitError, SpecError
from deploykit.spec import BuildOptions


def test_importing_it_imports_no_torch_no_onnx_and_no_tensorrt():
    code = (
        "import sys; import deploykit.backends.tensorrt.api, deploykit.backends.tensorrt.builder;"
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
    monkeypatch.setattr(api, "require", lambda name, distribution: old)
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
    for name in api.RTX_CAPABILITIES:
        assert api.set_gpus(trt, settings, flavour=api.RTX, capability=name, hardware="none") is None
        assert settings.get_compute_capability(0) == getattr(trt.ComputeCapability, name.upper())
    assert api.set_gpus(trt, settings, flavour=api.RTX, capability="sm87", hardware="none") == "target sm87"


def test_every_gpu_since_ampere_is_what_tensorrt_rtx_builds_for_by_itself(config):
    trt, _, settings = config
    assert api.set_gpus(trt, settings, flavour=api.RTX, capability=None, hardware="ampere_plus") is None
    assert settings.num_compute_capabilities == 0


def test_tensorrt_rtx_takes_a_hardware_level_and_ignores_it(config):
    trt, _, settings = config
    settings.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert settings.hardware_compatibility_level == trt.HardwareCompatibilityLevel.NONE


def test_full_tensorrt_is_told_its_hardware_level_and_version_compatibility(config):
    trt, _, settings = config
    told = types.SimpleNamespace()
    assert api.set_gpus(trt, told, flavour="tensorrt", capability="sm86", hardware="none") is None
    assert not vars(told)
    assert api.set_gpus(trt, told, flavour="tensorrt", capability="sm86", hardware="ampere_plus") is None
    assert told.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert api.set_version_compatible(trt, settings) is None
    assert settings.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def test_what_a_package_lacks_is_named():
    bare = types.SimpleNamespace(BuilderFlag=types.SimpleNamespace())
    lacks = api.set_gpus(bare, object(), flavour="tensorrt", capability=None, hardware="ampere_plus")
    assert lacks == "hardware compatibility 'ampere_plus'"
    assert api.set_version_compatible(bare, object()) == "version compatibility"


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        (BuildOptions(version_compatible=True), None, "no lean runtime.*--portable"),
        (BuildOptions(timing_cache="t.cache"), None, "'t.cache' was given.*measures no kernels"),
        (BuildOptions(hardware_compatibility="ampere_plus"), "sm89", "target='sm89' were both given"),
    ],
)
def test_what_tensorrt_rtx_does_not_do_is_refused_and_full_tensorrt_takes_it(options, target, message):
    with pytest.raises(SpecError, match=message):
        api.check_build_options(options, target, api.RTX)
    api.check_build_options(options, target, "tensorrt")


def test_a_timing_cache_that_tensorrt_refuses_is_begun_anew(tmp_path):
    class Config:
        """A builder's config that takes an empty timing cache alone."""

        def create_timing_cache(self, content: bytes) -> bytes:
            return b"new" if content == b"" else content

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            return cache in (b"new", b"of this GPU")

    file = tmp_path / "timing.cache"
    assert api.use_timing_cache(Config(), file) == b"new"
    file.write_bytes(b"of this GPU")
    assert api.use_timing_cache(Config(), file) == b"of this GPU"
    file.write_bytes(b"of another GPU")
    assert api.use_timing_cache(Config(), file) == b"new"
