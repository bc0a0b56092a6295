"""Engines compute in the threads that the process may use, or that they are told, and say nothing on stderr."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deploykit
from deploykit.errors import SpecError
from tests.backends.test_engine_file import wide_bundle

ROOT = Path(__file__).parent.parent.parent
PROCESSORS = sorted(os.sched_getaffinity(0))

pytestmark = pytest.mark.skipif(len(PROCESSORS) < 2, reason="only one processor may be used here")
every_cpu_runtime = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])

WORK = """
import os, sys
import numpy as np
import deploykit
path, threads = sys.argv[1], int(sys.argv[2]) or None
model = deploykit.load_bundle(path, threads=threads)
images = np.ones((1, *model.input_spec.shape[1:]), np.float32)
def ticks():
    found = {}
    for task in os.listdir("/proc/self/task"):
        fields = open(f"/proc/self/task/{task}/stat").read().rsplit(")", 1)[1].split()
        found[int(task)] = int(fields[11]) + int(fields[12])
    return found
model(images)
before = ticks()
for _ in range(150):
    model(images)
busy = sum(spent - before.get(task, 0) >= 2 for task, spent in ticks().items())
masks = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
outside = set().union(*masks) - os.sched_getaffinity(0)
print(busy, len(outside))
"""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("threads")
    return {name: wide_bundle(folder / name, name, 2304) for name in ("onnxruntime", "openvino")}


def work(bundle: Path, *before: str, threads: int = 0, **environment: str) -> tuple[int, int]:
    """How many threads computed, and how many processors outside the mask a thread is tied to."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    env |= {"PYTHONPATH": str(ROOT)} | environment
    command = [*before, sys.executable, "-c", WORK, str(bundle), str(threads)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    busy, outside = map(int, done.stdout.split())
    return busy, outside


@every_cpu_runtime
def test_openmps_variable_is_heard(runtime, bundles):
    assert work(bundles[runtime], OMP_NUM_THREADS="1")[0] == 1


@every_cpu_runtime
def test_the_number_that_is_asked_for_is_used(runtime, bundles):
    assert work(bundles[runtime], threads=1)[0] == 1


@every_cpu_runtime
@pytest.mark.parametrize("threads", [1, 2])
def test_the_runtime_says_the_number_that_is_asked_for(runtime, threads, bundles, monkeypatch):
    """A second thread may get too little work to be seen on a busy machine, so the runtime is asked."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with deploykit.load_bundle(bundles[runtime], threads=threads) as model:
        if runtime == "onnxruntime":
            said = model._session.get_session_options().intra_op_num_threads
        else:
            said = model._compiled.get_property("INFERENCE_NUM_THREADS")
    assert said == threads


@every_cpu_runtime
@pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset is not installed")
@pytest.mark.parametrize("processor", PROCESSORS[:2])
def test_no_thread_leaves_the_mask(runtime, processor, bundles):
    assert work(bundles[runtime], "taskset", "-c", str(processor)) == (1, 0)


@every_cpu_runtime
def test_a_quota_of_the_cgroup_is_heard(runtime, bundles):
    group = Path("/sys/fs/cgroup/cpu") / f"deploykit-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("100000")
    except OSError:
        pytest.skip("this user can make no cgroup of version 1 here")
    try:
        join = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        assert work(bundles[runtime], "sh", "-c", join, "sh")[0] == 1
    finally:
        group.rmdir()


def test_torch_compile_computes_in_the_number_that_is_asked_for(tmp_path):
    import torch

    from tests.backends.bundles import write_bundle
    from tests.conftest_graphs import photographs

    seen = []
    bundle = write_bundle(tmp_path / "bundle", "torch_compile")
    before = torch.get_num_threads()
    with deploykit.load_bundle(bundle, threads=before + 1) as model:
        run = model._loader.run

        class Watched:
            def run(self, images):
                seen.append(torch.get_num_threads())
                return run(images)

        model._loader = Watched()
        model(photographs(1))
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


@every_cpu_runtime
def test_no_threads_are_refused(runtime, bundles):
    with pytest.raises(SpecError, match="threads is 0"):
        deploykit.load_bundle(bundles[runtime], threads=0)
