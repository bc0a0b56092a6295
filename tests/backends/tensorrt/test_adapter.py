from __future__ import annotations

import ctypes
import dataclasses
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from deploykit.backends.backend import LowerOptions
from deploykit.backends.engine_file import EngineFile
from deploykit.backends.tensorrt import adapter, api
from deploykit.backends.tensorrt.adapter import TensorRTRuntime
from deploykit.backends.tensorrt.build import SETTINGS_FILE
from deploykit.backends.tensorrt.cuda_driver import cuda_capabilities, gpu_identity
from deploykit.backends.tensorrt.lower import lower_portable
from deploykit.backends.tensorrt.plan_file import check_plan
from deploykit.backends.tensorrt.portable import local_plan
from deploykit.bundle import FileRecord, Manifest
from deploykit.errors import (
    BundleError,
    DeviceUnavailable,
    ExportError,
    IncompatibleEngine,
    MissingDependency,
    SpecError,
)
from tests.conftest_graphs import engine_of, manifest_of, open_engine, photographs, reference, sqnr_db, tiny_graph

no_gpu = pytest.mark.skipif(bool(cuda_capabilities()), reason="there is a CUDA device")


@no_gpu
@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_a_plan_does_not_open_without_a_gpu_and_the_message_says_where_it_does(device: str):
    with pytest.raises(DeviceUnavailable, match=r"NVIDIA GPU of compute capability sm86.*no CUDA device.*Copy"):
        open_engine(*engine_of("tensorrt"), device)
    assert TensorRTRuntime.devices() == ()


@no_gpu
def test_no_tensorrt_runtime_is_made_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    import tensorrt_rtx

    def forbidden(*_: object) -> None:
        raise AssertionError("TensorRT's runtime can end the process here")

    monkeypatch.setattr(tensorrt_rtx, "Runtime", forbidden)
    with pytest.raises(DeviceUnavailable):
        open_engine(*engine_of("tensorrt"))


def test_a_plan_for_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapter, "cuda_capabilities", lambda: ("sm120",))
    with pytest.raises(IncompatibleEngine, match=r"sm86.*sm120.*target='sm120'"):
        open_engine(*engine_of("tensorrt"))


@no_gpu
def test_a_gpu_without_a_torch_that_can_use_it_is_a_missing_dependency(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapter, "cuda_capabilities", lambda: ("sm86",))
    with pytest.raises(MissingDependency, match="cuda-python"):
        open_engine(*engine_of("tensorrt"))


def test_a_plan_for_every_gpu_since_ampere_is_refused_by_an_older_one_alone(monkeypatch: pytest.MonkeyPatch):
    manifest, folder = engine_of("tensorrt")
    portable = {key: value for key, value in manifest.requires.items() if key != "compute_capability"}
    manifest = dataclasses.replace(manifest, requires=portable | {"hardware_compatibility": "ampere_plus"})
    monkeypatch.setattr(adapter, "cuda_capabilities", lambda: ("sm75",))
    with pytest.raises(IncompatibleEngine, match="for compute capability sm80 or newer and the GPU here has sm75"):
        open_engine(manifest, folder)
    for capability in ("sm80", "sm121"):
        monkeypatch.setattr(adapter, "cuda_capabilities", lambda capability=capability: (capability,))
        other = dataclasses.replace(manifest, files={manifest.engine: FileRecord(size=1, sha256="0" * 64)})
        with pytest.raises(IncompatibleEngine, match="SHA-256 differs"):  # the check behind
            open_engine(other, folder)


@pytest.mark.parametrize(
    ("built", "here", "opens"),
    [("10.3.0", "10.3.0", True), ("10.3.0", "10.13.2", True), ("10.3.0", "10.2.9", False), ("10.3.0", "11.0", False)],
)
def test_a_version_compatible_plan_opens_in_newer_versions_of_its_major(
    built: str, here: str, opens: bool, monkeypatch: pytest.MonkeyPatch
):
    manifest, folder = engine_of("tensorrt")
    requires = manifest.requires | {"flavour": "tensorrt", "version_compatible": "on"}
    compatible = dataclasses.replace(manifest, runtime_version=built, requires=requires)
    monkeypatch.setattr(api, "installed_flavours", lambda: ("tensorrt",))
    monkeypatch.setattr(api, "flavour_version", lambda flavour: here)
    monkeypatch.setattr(adapter, "cuda_capabilities", lambda: ())
    with pytest.raises(DeviceUnavailable if opens else IncompatibleEngine):
        open_engine(compatible, folder)


def test_another_version_is_refused_before_the_device_is_looked_for():
    manifest, folder = engine_of("tensorrt")
    with pytest.raises(IncompatibleEngine, match=r"exactly 1\.0\.0"):
        open_engine(dataclasses.replace(manifest, runtime_version="1.0.0"), folder)


def test_a_plan_of_the_other_package_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    manifest, folder = engine_of("tensorrt")
    foreign = dataclasses.replace(manifest, requires=manifest.requires | {"flavour": "tensorrt"})
    monkeypatch.setattr(api, "installed_flavours", lambda: ("tensorrt_rtx",))
    with pytest.raises(IncompatibleEngine, match=r"built with tensorrt, and here is tensorrt_rtx.*--portable"):
        open_engine(foreign, folder)


@pytest.fixture
def gpu_in_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver names one GPU of the plan's kind, so that the checks behind it are reached."""
    monkeypatch.setattr(adapter, "cuda_capabilities", lambda: ("sm86",))


@pytest.mark.usefixtures("gpu_in_name")
@pytest.mark.parametrize("device", ["cuda:1", "cpu", "cuda:x"])
def test_a_gpu_that_is_not_here_is_refused_with_those_that_are(device: str):
    with pytest.raises(DeviceUnavailable, match=rf"the GPUs are sm86, and '{device}'"):
        open_engine(*engine_of("tensorrt"), device)


def _truncated(plan: bytes) -> bytes:
    return plan[: len(plan) // 2]


def _garbage(plan: bytes) -> bytes:
    return bytes(range(256)) * 64


def _empty(plan: bytes) -> bytes:
    return b""


def _of_another_version(plan: bytes) -> bytes:
    return plan[:25] + bytes([plan[25] ^ 1]) + plan[26:]


@pytest.mark.usefixtures("gpu_in_name")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncated, "its header says"),
        (_garbage, "no plan of TensorRT-RTX"),
        (_empty, "has 0 bytes"),
        (_of_another_version, r"written by TensorRT-RTX \d+\.\d+.*the manifest says"),
    ],
)
def test_a_damaged_or_foreign_plan_never_reaches_tensorrt(damage, message, tmp_path, monkeypatch):
    import tensorrt_rtx

    def forbidden(*_: object) -> None:
        raise AssertionError("TensorRT's parser was given a damaged plan")

    monkeypatch.setattr(tensorrt_rtx, "Runtime", forbidden)
    manifest, folder = engine_of("tensorrt")
    (tmp_path / manifest.engine).write_bytes(damage((folder / manifest.engine).read_bytes()))
    with pytest.raises(IncompatibleEngine, match=message):
        open_engine(manifest, tmp_path)


def test_a_plan_of_tensorrt_rtx_never_reaches_full_tensorrt():
    manifest, folder = engine_of("tensorrt")
    with pytest.raises(IncompatibleEngine, match="a plan of TensorRT-RTX, and the manifest says tensorrt"):
        check_plan((folder / manifest.engine).read_bytes(), "tensorrt", "10.13.2")


@pytest.mark.usefixtures("gpu_in_name")
def test_a_plan_whose_digest_is_not_the_manifests_is_not_opened():
    manifest, folder = engine_of("tensorrt")
    other = dataclasses.replace(manifest, files={manifest.engine: FileRecord(size=1, sha256="0" * 64)})
    with pytest.raises(IncompatibleEngine, match="SHA-256 differs"):
        open_engine(other, folder)


@pytest.mark.usefixtures("gpu_in_name")
def test_a_missing_plan_is_a_bundle_error(tmp_path: Path):
    with pytest.raises(BundleError, match="cannot be read"):
        open_engine(engine_of("tensorrt")[0], tmp_path)


def test_a_missing_driver_means_no_device(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert cuda_capabilities() == ()


@pytest.mark.parametrize(("status", "expected"), [(100, ()), (0, ("sm89", "sm89"))], ids=["no device", "two"])
def test_the_driver_is_asked_for_every_device(status: int, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    class Driver:
        """libcuda's four calls, with two GPUs of compute capability 8.9."""

        def cuInit(self, flags: int) -> int:  # noqa: N802
            return status

        def cuDeviceGetCount(self, count: object) -> int:  # noqa: N802
            count._obj.value = 2  # type: ignore[attr-defined]
            return 0

        def cuDeviceGet(self, device: object, ordinal: int) -> int:  # noqa: N802
            return 0

        def cuDeviceGetAttribute(self, value: object, attribute: int, device: object) -> int:  # noqa: N802
            value._obj.value = {75: 8, 76: 9}[attribute]  # type: ignore[attr-defined]
            return 0

        def cuDriverGetVersion(self, version: object) -> int:  # noqa: N802
            version._obj.value = 13000  # type: ignore[attr-defined]
            return 0

        def cuDeviceGetName(self, name: object, size: int, device: object) -> int:  # noqa: N802
            name.value = b"Some GPU"  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert cuda_capabilities() == expected
    if expected:
        identity = gpu_identity(1)
        assert (identity["gpu"], identity["compute_capability"], identity["cuda"]) == ("Some GPU", "sm89", "13000")


def test_importing_the_adapters_imports_no_runtime_and_no_torch():
    code = (
        "import sys; from deploykit.backends.table import *; [load_backend(n).load_adapter() for n in engine_names()];"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt_rtx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- portable bundles: the device's own build, done here without the device

IDENTITY = {"gpu": "some GPU", "compute_capability": "sm89", "driver": "1.2", "cuda": "13000"}


@pytest.fixture
def portable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Manifest, Path]:
    """A portable engine, and an engine cache of the test's own."""
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "portable"
    folder.mkdir()
    engine = lower_portable(tiny_graph(), folder, LowerOptions())
    return manifest_of("tensorrt", tiny_graph(), engine), folder


def opened(manifest: Manifest, folder: Path, identity: dict[str, str]) -> None:
    graph = EngineFile(manifest, folder)
    try:
        with local_plan(manifest, graph, identity):
            pass
    finally:
        graph.close()


@no_gpu
def test_a_portable_bundle_opens_on_no_version_in_particular_but_needs_a_gpu(portable):
    with pytest.raises(DeviceUnavailable, match=r"the graph model\.onnx.*compute capability any"):
        open_engine(*portable)


def test_the_first_opening_builds_a_plan_and_says_so_and_the_next_finds_it(portable, caplog):
    with caplog.at_level(logging.WARNING, "deploykit.backends.tensorrt.portable"):
        for _ in range(2):
            graph = EngineFile(*portable)
            with local_plan(portable[0], graph, IDENTITY) as (manifest, entry):
                assert (entry / "model.plan").stat().st_size > 10_000
            graph.close()
    assert [record.message[:39] for record in caplog.records] == ["Building the TensorRT plan of tiny for "]
    assert (manifest.engine, manifest.requires["compute_capability"]) == ("model.plan", "sm89")
    assert manifest.runtime_version == api.flavour_version("tensorrt_rtx")


def test_a_plan_is_kept_for_one_gpu_one_driver_one_version_and_one_graph(portable, monkeypatch):
    manifest, folder = portable
    built: list[Path] = []

    def record(model: Path, plan: Path, settings: object, **_: object) -> None:
        plan.write_bytes(b"plan")
        built.append(plan)

    monkeypatch.setattr("deploykit.backends.tensorrt.portable.build_plan", record)
    opened(manifest, folder, IDENTITY)
    for change in ({"gpu": "another"}, {"driver": "1.3"}, {"compute_capability": "sm86"}, {}):
        opened(manifest, folder, IDENTITY | change)
    assert len(built) == 4
    (folder / manifest.engine).write_bytes(b"another graph")
    opened(manifest, folder, IDENTITY)
    assert len(built) == 5
    monkeypatch.setattr(api, "flavour_version", lambda flavour: "99")
    opened(manifest, folder, IDENTITY)
    assert len(built) == 6


def test_a_build_that_fails_on_the_device_leaves_no_entry(portable, tmp_path):
    manifest, folder = portable
    (folder / manifest.engine).write_bytes(b"not an ONNX file")
    with pytest.raises(ExportError, match="build for sm89 failed"):
        opened(manifest, folder, IDENTITY)
    assert not [path for path in (tmp_path / "cache" / "engines").iterdir() if path.is_dir()]


def test_absent_settings_of_the_build_are_a_bundle_error(portable):
    manifest, folder = portable
    (folder / SETTINGS_FILE).unlink()
    with pytest.raises(BundleError, match=SETTINGS_FILE):
        opened(manifest, folder, IDENTITY)


# ---- on a GPU

gpu = pytest.mark.skipif(not cuda_capabilities(), reason="no CUDA device")


@pytest.fixture(scope="module")
def plan_here(tmp_path_factory) -> tuple[Manifest, Path]:
    """The small network's plan for the GPU of this machine."""
    folder = tmp_path_factory.mktemp("plan")
    engine = lower_portable(tiny_graph(), folder, LowerOptions())
    return manifest_of("tensorrt", tiny_graph(), engine), folder


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_plan_gives_torchs_numbers_for_every_batch(plan_here, count: int):
    images = photographs(count)
    with open_engine(*plan_here) as model:
        for expected, actual in zip(reference(images), model(images).values(), strict=True):
            assert sqnr_db(expected, actual) >= 100


@pytest.mark.gpu
@gpu
def test_a_batch_beyond_the_profile_is_refused_and_the_model_goes_on(plan_here):
    with open_engine(*plan_here) as model:
        with pytest.raises(SpecError, match="9"):
            model(photographs(9))
        with pytest.raises(SpecError, match="9"):
            model(torch.from_numpy(photographs(9)).cuda())
        images = photographs(2)
        for expected, actual in zip(reference(images), model(images).values(), strict=True):
            assert sqnr_db(expected, actual) >= 100


@pytest.mark.gpu
@gpu
def test_the_manifest_can_say_on_which_gpu_a_plan_ran(plan_here):
    with open_engine(*plan_here) as model:
        seen = model.seen_on()
    assert seen["compute_capability"] == cuda_capabilities()[0]
    assert seen["gpu"]
    assert seen["tensorrt_rtx"] == api.flavour_version("tensorrt_rtx")


@pytest.mark.gpu
@gpu
def test_cuda_tensors_are_read_and_given_without_a_copy_through_the_host(plan_here):
    images = photographs(2)
    with open_engine(*plan_here) as model:
        found = model(torch.from_numpy(images).cuda())
        assert all(output.is_cuda for output in found.values())
        for expected, actual in zip(reference(images), found.values(), strict=True):
            assert sqnr_db(expected, actual.cpu().numpy()) >= 100
        with pytest.raises(SpecError, match=r"torch\.float16"):
            model(torch.from_numpy(images).cuda().half())


@pytest.mark.gpu
@gpu
def test_threads_have_contexts_of_their_own(plan_here):
    batches = [photographs(count, seed=count) for count in (1, 2, 4, 8)]
    wrong: list[str] = []
    with open_engine(*plan_here) as model:

        def work(images: np.ndarray) -> None:
            for _ in range(20):
                for expected, actual in zip(reference(images), model(images).values(), strict=True):
                    if sqnr_db(expected, actual) < 100:
                        wrong.append(str(images.shape))

        threads = [threading.Thread(target=work, args=(images,)) for images in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.gpu
@gpu
def test_a_recorded_graph_of_kernels_gives_the_same_numbers(plan_here):
    manifest, folder = plan_here
    images = photographs(2)
    with TensorRTRuntime(manifest, folder, cuda_graphs=True) as model:
        for _ in range(3):
            for expected, actual in zip(reference(images), model(images).values(), strict=True):
                assert sqnr_db(expected, actual) >= 100


@pytest.mark.gpu
@gpu
def test_buffers_of_cuda_python_give_the_same_numbers(plan_here, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    monkeypatch.setattr("deploykit.backends.tensorrt.cuda_buffers.torch_has_cuda", lambda: False)
    images = photographs(2)
    with open_engine(*plan_here) as model:
        for expected, actual in zip(reference(images), model(images).values(), strict=True):
            assert sqnr_db(expected, actual) >= 100


@pytest.mark.gpu
@gpu
def test_a_call_of_a_small_plan_takes_under_5_ms(plan_here):
    images = torch.from_numpy(photographs(1)).cuda()
    with open_engine(*plan_here) as model:
        model(images)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            model(images)
        torch.cuda.synchronize()
    assert (time.perf_counter() - start) / 100 < 0.005
