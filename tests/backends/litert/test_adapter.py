"""The LiteRT adapter: integers at the ends, batches, and engines that are not what the manifest says."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from deploykit.backends import runtime
from deploykit.backends.litert import adapter
from deploykit.backends.litert.adapter import Port
from deploykit.backends.litert.package import load_interpreter
from deploykit.errors import BundleError, DeviceUnavailable
from tests.conftest_graphs import engine_of, open_engine, photographs


def port(dtype: type) -> Port:
    return Port(index=0, shape=(1, 3, 4, 4), dtype=np.dtype(dtype), scale=0.5, zero_point=-3)


def test_images_are_rounded_to_the_integers_that_an_engine_takes():
    images = np.array([0.0, 0.24, 0.26, -1.0, 1e25, -1e25], np.float32)
    np.testing.assert_array_equal(port(np.int8).encode(images), np.array([-3, -3, -2, -5, 127, -128], np.int8))
    np.testing.assert_array_equal(port(np.float32).encode(images), images)


def test_integers_become_the_floats_that_they_stand_for():
    integers = np.array([-3, -1, 127], np.int8)
    np.testing.assert_array_equal(port(np.int8).decode(integers), np.array([0, 1, 65], np.float32))
    floats = np.array([1.5], np.float32)
    np.testing.assert_array_equal(port(np.float32).decode(floats), floats)


def test_an_engine_of_another_size_or_input_is_refused_when_it_is_opened():
    manifest, folder = engine_of("litert")
    for change in ({"height": 64}, {"name": "pixels"}):
        other = dataclasses.replace(manifest, input=dataclasses.replace(manifest.input, **change))
        with pytest.raises(BundleError, match=r"has the inputs images \(1, 3, 32, 32\).*export the bundle again"):
            open_engine(other, folder)


def test_a_dynamic_batch_runs_image_by_image():
    images = photographs(3)
    with open_engine(*engine_of("litert")) as model:
        together = model(images)["stage1"]
        for index in range(3):
            np.testing.assert_array_equal(model(images[index : index + 1])["stage1"][0], together[index])


@pytest.mark.parametrize(("asked", "computing"), [(None, 3), (2, 2)])
def test_an_engine_computes_in_every_thread_that_the_process_may_use(monkeypatch, asked, computing):
    """LiteRT itself takes one where no number is given."""
    library, numbers = load_interpreter(), []

    def interpreter(**settings):
        numbers.append(settings["num_threads"])
        return library.Interpreter(**settings)

    monkeypatch.setattr(adapter, "load_interpreter", lambda: SimpleNamespace(Interpreter=interpreter))
    monkeypatch.setattr(runtime, "count_cores", lambda processors: 3)
    monkeypatch.setattr(runtime, "thread_limit", lambda: None)
    with open_engine(*engine_of("litert"), threads=asked) as model:
        assert model(photographs(1))["stage1"].size
    assert numbers == [computing]


def test_gpus_and_npus_are_left_to_apps():
    with pytest.raises(DeviceUnavailable, match=r"'gpu'.*device='cpu'.*model\.tflite"):
        open_engine(*engine_of("litert"), device="gpu")
