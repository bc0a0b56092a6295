"""The ExecuTorch adapter: batches, names, the one pool of threads, and engines that are not what the manifest says."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest

from deploykit.backends.executorch.package import load_library
from deploykit.backends.table import load_backend
from deploykit.errors import BundleError, DeviceUnavailable, IncompatibleEngine, SpecError
from tests.backends.test_processes import in_child
from tests.conftest_graphs import engine_of, open_engine, photographs


def open_with(threads: int):
    manifest, folder = engine_of("executorch")
    return load_backend("executorch").load_adapter()(manifest, folder, threads=threads)


def test_an_engine_of_another_size_or_input_is_refused_when_it_is_opened():
    manifest, folder = engine_of("executorch")
    for change in ({"height": 64}, {"name": "pixels"}):
        other = dataclasses.replace(manifest, input=dataclasses.replace(manifest.input, **change))
        with pytest.raises(BundleError, match=r"has the inputs images \(1, 3, 32, 32\).*export the bundle again"):
            open_engine(other, folder)


def test_outputs_go_by_their_names_in_the_file():
    manifest, folder = engine_of("executorch")
    images = photographs(1)
    with open_engine(manifest, folder) as model:
        expected = model._run(images)
    with open_engine(dataclasses.replace(manifest, outputs=manifest.outputs[::-1]), folder) as model:
        for one, other in zip(expected, model._run(images)[::-1], strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_dynamic_batch_runs_image_by_image():
    images = photographs(3)
    with open_engine(*engine_of("executorch")) as model:
        together = model(images)["stage1"]
        for index in range(3):
            np.testing.assert_array_equal(model(images[index : index + 1])["stage1"][0], together[index])


def test_gpus_are_left_to_apps():
    with pytest.raises(DeviceUnavailable, match=r"'gpu'.*device='cpu'"):
        open_engine(*engine_of("executorch"), device="gpu")


def test_a_file_that_ends_too_early_is_a_bundle_error(tmp_path):
    manifest, folder = engine_of("executorch")
    content = (folder / manifest.engine).read_bytes()
    (tmp_path / manifest.engine).write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match=r"not a readable ExecuTorch program.*copy it again"):
        open_engine(manifest, tmp_path)


def test_an_unknown_delegate_is_an_incompatible_engine(tmp_path):
    manifest, folder = engine_of("executorch")
    content = (folder / manifest.engine).read_bytes()
    assert content.count(b"XnnpackBackend") == 1
    (tmp_path / manifest.engine).write_bytes(content.replace(b"XnnpackBackend", b"AnotherBackend"))
    with pytest.raises(IncompatibleEngine, match=r"does not prepare model\.pte.*export the bundle again"):
        open_engine(manifest, tmp_path)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_pool_has_the_threads_that_are_asked_for(threads):
    with open_with(threads) as model:
        assert model.threads == threads
        assert load_library()._threadpool_get_thread_count() == threads


def test_engines_that_are_open_at_a_time_have_the_same_threads():
    images = photographs(1)
    with open_with(2) as model:
        expected = model(images)["stage1"]
        with pytest.raises(SpecError, match=r"threads is 1.*has 2 threads.*1 other open engine.*the same threads"):
            open_with(1)
        with open_with(2) as same, open_engine(*engine_of("executorch")) as taken:
            assert same.threads == taken.threads == 2
        np.testing.assert_array_equal(model(images)["stage1"], expected)
    open_with(1).close()


def test_a_fork_of_a_process_with_threads_opens_no_engine():
    def reopen() -> None:
        with pytest.raises(SpecError, match=rf"fork of {os.getppid()}.*'spawn'"):
            open_engine(*engine_of("executorch"))

    with open_with(2):
        assert in_child(reopen) == 0
