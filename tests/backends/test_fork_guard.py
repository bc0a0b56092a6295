"""A fork waits until no thread is in the middle of a run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from threading import Event, Thread

import pytest

from deploykit.backends import fork_guard
from deploykit.backends.fork_guard import ForkGuard
from tests.backends.bundles import write_bundle


def fork() -> float:
    """Fork a child that ends at once; the seconds that this took."""
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    return time.monotonic() - begun


def held(guard: ForkGuard, until: Event) -> Thread:
    """Start a thread that is in the guard until the event, and wait until it is."""
    inside = Event()

    def hold() -> None:
        with guard:
            inside.set()
            until.wait()

    thread = Thread(target=hold)
    thread.start()
    inside.wait()
    return thread


def test_a_fork_waits_for_a_run_and_a_run_for_a_fork():
    guard, until = ForkGuard(), Event()
    thread = held(guard, until)
    Thread(target=lambda: (time.sleep(0.3), until.set())).start()
    assert fork() > 0.2
    thread.join()
    with guard:
        pass


def test_a_fork_waits_only_so_long(monkeypatch):
    monkeypatch.setattr(fork_guard, "LONGEST_WAIT", 0.1)
    guard, until = ForkGuard(), Event()
    thread = held(guard, until)
    assert fork() < 5
    until.set()
    thread.join()


FORKS = """
import os, signal, sys
from threading import Thread
import numpy as np
import deploykit
model = deploykit.load_bundle(sys.argv[1])
images = np.zeros((1, 3, 32, 32), np.float32)
for _ in range(40):
    thread = Thread(target=lambda: [model(images) for _ in range(20)])
    thread.start()
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        deploykit.load_bundle(sys.argv[1])(images)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        os._exit(1)
    thread.join()
os._exit(0)
"""


def test_a_child_that_is_forked_while_threads_call_opens_its_own_engine(tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed")
    bundle = write_bundle(tmp_path / "bundle", "openvino")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS, bundle], check=False, timeout=120)
    assert done.returncode == 0, "a child hung"
