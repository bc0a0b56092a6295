"""An engine belongs to the process that opened it: a forked child is told so at once, a spawned one opens its own."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import deploykit
from deploykit.errors import BundleError, SpecError
from tests.backends.bundles import write_bundle
from tests.conftest_graphs import RAN_HERE, engine_of, open_engine, photographs

SECONDS = 20
every_runtime = pytest.mark.parametrize("runtime", RAN_HERE)
without_openmp = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])


@pytest.fixture
def bundle(runtime: str, tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", runtime)


def in_child(action) -> int:
    """Run an action in a forked child, which ends as a program does; the exit status, or a failure where it hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return _wait(child)


def _wait(child: int) -> int:
    status = os.waitpid(child, 0)[1]
    assert not os.WIFSIGNALED(status), f"the child hung for {SECONDS} s"
    return os.WEXITSTATUS(status)


@every_runtime
def test_a_call_in_a_forked_child_is_a_typed_error_at_once(bundle):
    with deploykit.load_bundle(bundle) as model:
        model(photographs(1))

        def call() -> None:
            begun = time.monotonic()
            with pytest.raises(SpecError, match=r"forked child.*load_bundle\(.*'spawn'"):
                model(photographs(1))
            assert time.monotonic() - begun < 1

        assert in_child(call) == 0
        model(photographs(1))


END = """
import os, signal, sys
import numpy as np
import deploykit
model = deploykit.load_bundle(sys.argv[1], trust=True)
images = np.zeros((1, 3, 32, 32), np.float32)
model(images)
child = os.fork()
if child == 0:
    signal.alarm(20)
    {action}
    sys.exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


@every_runtime
@pytest.mark.parametrize(
    "action",
    [
        "model = None; import gc; gc.collect()",
        *(pytest.param(action, marks=pytest.mark.slow) for action in ("pass", "model.close()", "del model")),
    ],
)
def test_a_forked_child_ends_whatever_it_did_with_the_engine(bundle, action):
    done = subprocess.run(
        [sys.executable, "-c", END.format(action=action), str(bundle)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@without_openmp
def test_a_forked_child_opens_an_engine_of_its_own(bundle):
    images = photographs(1)
    with deploykit.load_bundle(bundle) as model:
        expected = model(images)["stage1"]

        def reopen() -> None:
            with deploykit.load_bundle(bundle) as own:
                np.testing.assert_array_equal(own(images)["stage1"], expected)

        assert in_child(reopen) == 0


def through_pickle(model):
    return unpickled(pickle.dumps(model))


def unpickled(data: bytes):
    return pickle.loads(data)  # noqa: S301  (what a worker does)


@every_runtime
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, through_pickle])
def test_a_copy_is_the_same_engine_opened_once_more(bundle, duplicate):
    images = photographs(1)
    with deploykit.load_bundle(bundle, threads=1) as model, duplicate(model) as other:
        assert other is not model
        assert other.threads == 1
        model.close()
        assert other(images)["stage1"].shape == (1, 16, 8, 8)


def _call_there(model, images, queue) -> None:
    queue.put(model(images)["stage1"])


@pytest.mark.parametrize("runtime", ["onnxruntime"])
def test_a_spawned_worker_gets_the_engine(bundle):
    images = photographs(1)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with deploykit.load_bundle(bundle) as model:
        worker = context.Process(target=_call_there, args=(model, images, queue))
        worker.start()
        there = queue.get()
        worker.join(SECONDS)
        np.testing.assert_array_equal(there, model(images)["stage1"])


@without_openmp
def test_a_copy_of_a_bundle_that_was_replaced_is_refused(bundle, runtime, tmp_path):
    with deploykit.load_bundle(bundle) as model:
        pickled = pickle.dumps(model)
    write_bundle(bundle, runtime, scaled=True)
    with pytest.raises(BundleError, match="not the file that the manifest describes"):
        unpickled(pickled)


@pytest.mark.parametrize("runtime", ["onnxruntime"])
def test_a_copy_of_a_bundle_that_is_gone_is_refused(bundle):
    with deploykit.load_bundle(bundle) as model:
        pickled = pickle.dumps(model)
    (bundle / "model.onnx").unlink()
    with pytest.raises(BundleError, match="it is missing"):
        unpickled(pickled)


def test_an_engine_without_a_manifest_on_the_disk_keeps_its_digests(tmp_path):
    manifest, folder = engine_of("onnxruntime")
    with open_engine(manifest, folder) as model:
        loaded = through_pickle(model)
        assert loaded.manifest.files["model.onnx"].size == (folder / "model.onnx").stat().st_size


@pytest.mark.parametrize("runtime", ["onnxruntime"])
def test_a_closed_model_is_not_copied(bundle):
    model = deploykit.load_bundle(bundle)
    model.close()
    with pytest.raises(SpecError, match="closed"):
        pickle.dumps(model)
