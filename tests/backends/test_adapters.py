"""What every runtime that runs on this machine promises, on one small real network."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deploykit.backends.runtime import Runtime
from deploykit.backends.table import engine_names, load_backend
from deploykit.errors import BundleError, DeployKitError, DeviceUnavailable, IncompatibleEngine, SpecError
from deploykit.spec import TensorSpec
from tests.conftest_graphs import RAN_HERE, engine_of, open_engine, photographs, reference, sqnr_db

every_runtime = pytest.mark.parametrize("name", RAN_HERE)


@pytest.fixture
def model(name: str):
    with open_engine(*engine_of(name)) as opened:
        yield opened


@every_runtime
@pytest.mark.parametrize("count", [1, 3, 8])
def test_features_equal_torch_at_every_batch(model: Runtime, count: int):
    images = photographs(count)
    features = model(images)
    assert list(features) == ["stem", "stage1"]
    for expected, actual in zip(reference(images), features.values(), strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == np.float32
        assert actual.flags.c_contiguous
        assert sqnr_db(expected, actual) >= 100


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_classifier_returns_its_logits_alone(name: str):
    images = photographs(1)
    with open_engine(*engine_of(name, features_only=False, dynamic=False)) as model:
        logits = model(images)
        with pytest.raises(SpecError, match="takes 1"):
            model(photographs(2))
    assert logits.shape == (1, 10)
    assert sqnr_db(reference(images, features_only=False)[0], logits) >= 100


@every_runtime
def test_torch_in_gives_torch_out(model: Runtime):
    images = photographs(2)
    from_torch = model(torch.from_numpy(images).requires_grad_())
    for expected, actual in zip(model(images).values(), from_torch.values(), strict=True):
        assert isinstance(actual, torch.Tensor)
        np.testing.assert_array_equal(actual.numpy(), expected)


@every_runtime
def test_outputs_belong_to_the_caller(model: Runtime):
    first = model(photographs(1, seed=1))
    kept = {key: value.copy() for key, value in first.items()}
    for value in model(photographs(1, seed=2)).values():
        value.fill(7)
    for key, value in first.items():
        np.testing.assert_array_equal(value, kept[key])
        assert value.flags.writeable


@every_runtime
def test_images_are_not_written_and_may_be_read_only_or_strided(model: Runtime):
    images = photographs(2)
    expected = model(images.copy())
    images.flags.writeable = False
    strided = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for view in (images, strided):
        for key, value in model(view).items():
            np.testing.assert_array_equal(value, expected[key])


@every_runtime
def test_threads_get_the_numbers_of_their_own_images(model: Runtime):
    batches = [photographs(1 + seed % 3, seed=seed) for seed in range(6)]
    alone = [model(images) for images in batches]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda index: model(batches[index % 6]), range(120)))
    for index, features in enumerate(together):
        for key, value in alone[index % 6].items():
            np.testing.assert_array_equal(features[key], value)


BAD_IMAGES = {
    "unbatched": (photographs(1)[0], r"Add the batch dimension"),
    "other size": (np.zeros((1, 3, 16, 32), np.float32), r"\(1, 3, 16, 32\).*\('batch', 3, 32, 32\)"),
    "NHWC": (np.zeros((1, 32, 32, 3), np.float32), "NHWC"),
    "float64": (np.zeros((1, 3, 32, 32)), "float64"),
    "uint8": (np.zeros((1, 3, 32, 32), np.uint8), "load_images"),
    "too many": (photographs(9), "9 images and the model takes 1..8"),
    "none": (photographs(0), "0 images"),
    "NaN": (np.where(np.arange(3).reshape(3, 1, 1, 1) == 1, np.nan, photographs(3)).astype(np.float32), r"\[1\]"),
    "infinity": (np.full((1, 3, 32, 32), np.inf, np.float32), "infinity"),
    "a list": ([[0.0]], "list"),
    "masked": (np.ma.masked_greater(photographs(1), 0), "masked array"),
    "meta": (torch.zeros(1, 3, 32, 32, device="meta"), "meta tensor"),
    "nested": (torch.nested.nested_tensor([torch.zeros(3, 32, 32)], layout=torch.jagged), "nested tensor"),
    "sparse": (torch.zeros(1, 3, 32, 32).to_sparse(), "to_dense"),
    "complex": (torch.zeros(1, 3, 32, 32, dtype=torch.complex64).conj(), "complex64"),
    "torch.bfloat16": (torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16), r"torch\.bfloat16"),
}


TRANSFORMS = {
    "vmap": lambda model, images: torch.vmap(model)(images[None]),
    "grad": lambda model, images: torch.func.grad(lambda inside: next(iter(model(inside).values())).sum())(images),
    "jvp": lambda model, images: torch.func.jvp(lambda inside: model(inside)[1], (images,), (images,)),
    "trace": lambda model, images: torch.jit.trace(lambda inside: model(inside)[1], images),
}


@every_runtime
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_tensors_of_torchs_transforms_are_refused(model: Runtime, transform):
    with pytest.raises(SpecError, match="whose values cannot be read"):
        transform(model, torch.from_numpy(photographs(1)))


@every_runtime
def test_a_tensor_without_values_is_refused(model: Runtime):
    with FakeTensorMode():
        images = torch.zeros(1, 3, 32, 32)
    with pytest.raises(SpecError, match="FakeTensor whose values cannot be read"):
        model(images)


@every_runtime
def test_a_tensor_that_torch_negates_lazily_is_read_as_it_is_seen(model: Runtime):
    images = torch.from_numpy(photographs(1))
    lazy = torch.complex(torch.zeros_like(images), -images).conj().imag
    assert lazy.is_neg()
    for name, value in model(images).items():
        torch.testing.assert_close(model(lazy)[name], value)


@every_runtime
@pytest.mark.parametrize("fault", BAD_IMAGES)
def test_bad_images_are_named(model: Runtime, fault: str):
    images, message = BAD_IMAGES[fault]
    with pytest.raises(SpecError, match=message):
        model(images)


@every_runtime
def test_large_finite_images_are_taken(model: Runtime):
    model(np.full((1, 3, 32, 32), 1e25, np.float32))


@every_runtime
def test_a_closed_model_says_so(name: str):
    model = open_engine(*engine_of(name))
    model.close()
    model.close()
    with pytest.raises(SpecError, match=f"this {name} model is closed"):
        model(photographs(1))


@every_runtime
def test_closing_under_running_threads_gives_numbers_or_the_closed_error(name: str):
    model, images = open_engine(*engine_of(name)), photographs(1)
    expected = model(images)["stage1"]

    def call(index: int) -> bool:
        if index == 20:
            model.close()
        try:
            return bool((model(images)["stage1"] == expected).all())
        except SpecError as error:
            return "closed" in str(error)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(60)))


@every_runtime
def test_the_device_is_reported_and_others_are_refused(name: str):
    manifest, folder = engine_of(name)
    with open_engine(manifest, folder, "cpu") as model:
        assert model.device == "cpu"
        assert model.device in model.devices()
    with pytest.raises(DeviceUnavailable, match=r"'abacus'.*cpu"):
        open_engine(manifest, folder, "abacus")


@every_runtime
@pytest.mark.parametrize("version", ["9999.0.0", "0.0.1"])
def test_another_version_is_refused_as_the_policy_says(name: str, version: str):
    manifest, folder = engine_of(name)
    other = dataclasses.replace(manifest, runtime_version=version)
    backend = load_backend(name)
    if backend.least_version is not None or (version == "0.0.1" and backend.version_rule == "same_or_newer"):
        open_engine(other, folder).close()  # what the engine needs counts, not who wrote it
        return
    with pytest.raises(IncompatibleEngine, match=f"built with .* {version}.*Install"):
        open_engine(other, folder)


@every_runtime
@pytest.mark.parametrize("content", [b"", b"not an engine at all" * 50, None], ids=["empty", "garbage", "missing"])
def test_an_unreadable_engine_is_a_bundle_error(name: str, content: bytes | None, tmp_path: Path):
    manifest, _ = engine_of(name)
    if content is not None:
        (tmp_path / manifest.engine).write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.\w+.*again"):
        open_engine(manifest, tmp_path)


@every_runtime
def test_outputs_that_the_engine_lacks_are_refused(name: str):
    manifest, folder = engine_of(name)
    more = (*manifest.outputs, TensorSpec(name="stage9", shape=("batch", 1)))
    with pytest.raises(BundleError, match="stage9"):
        open_engine(dataclasses.replace(manifest, outputs=more), folder)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_engine_that_fails_while_running_is_a_typed_error(name: str):
    manifest, folder = engine_of(name)
    other = dataclasses.replace(manifest, input=dataclasses.replace(manifest.input, channels=4))
    with open_engine(other, folder) as model, pytest.raises(DeployKitError, match=r"(?s)failed to run.*again"):
        model(np.zeros((1, 4, 32, 32), np.float32))


@pytest.mark.parametrize("name", engine_names())
def test_the_table_names_classes_of_one_shape(name: str):
    backend = load_backend(name)
    assert backend.name == name
    assert issubclass(backend.load_adapter(), Runtime)
    assert "fp32" in backend.precisions


def test_an_unknown_runtime_gets_the_nearest_spelling():
    with pytest.raises(SpecError, match="openvino"):
        load_backend("openvno")
