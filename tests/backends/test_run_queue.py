"""The queue of threads behind a stream: who runs what."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from deploykit.backends.run_queue import BLOCKED_AFTER, ThreadQueue

PATIENCE = 30.0


class Recorded:
    """Runs that say in which thread they ran; run 0 goes on until the last one has ended."""

    def __init__(self, last: int) -> None:
        self.last, self.threads = last, {}
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self, images):
        number = int(images[0])
        self.threads[number] = threading.current_thread()
        if number == 0:
            self.begun.set()
            assert self.ended.wait(PATIENCE)
        if number == self.last:
            self.ended.set()
        return [images + 1]


def started(queue: ThreadQueue, run: Recorded):
    """The first run in a thread, then the others."""
    waits = [queue.start(np.array([0.0]))]
    assert run.begun.wait(PATIENCE)
    return waits + [queue.start(np.array([float(number)])) for number in range(1, run.last + 1)]


def test_who_waits_runs_what_no_thread_has_begun():
    run = Recorded(last=3)
    queue = ThreadQueue(run, 2)
    waits = started(queue, run)
    assert [float(wait()[0][0]) for wait in waits] == [1.0, 2.0, 3.0, 4.0]
    own = threading.current_thread()
    assert run.threads[0] is not own
    assert {run.threads[number] for number in (1, 2, 3)} == {own}
    queue.close()


def test_a_slow_source_has_a_thread_for_each_run():
    run = Recorded(last=2)
    queue = ThreadQueue(run, 2)
    queue.source_blocked(2 * BLOCKED_AFTER)
    assert [float(wait()[0][0]) for wait in started(queue, run)] == [1.0, 2.0, 3.0]
    assert len(set(run.threads.values())) == 2
    assert threading.current_thread() not in run.threads.values()
    queue.close()


def test_a_source_that_hardly_waits_leaves_its_reader_at_work():
    run = Recorded(last=1)
    queue = ThreadQueue(run, 2)
    queue.source_blocked(BLOCKED_AFTER / 2)
    for wait in started(queue, run):
        wait()
    assert run.threads[1] is threading.current_thread()
    queue.close()


def test_one_processor_has_one_thread():
    run = Recorded(last=0)
    run.ended.set()
    queue = ThreadQueue(run, 1)
    queue.start(np.array([0.0]))()
    assert run.threads[0] is not threading.current_thread()
    queue.close()


def test_what_a_run_raises_comes_where_it_is_waited_for():
    def run(images):
        raise ValueError(f"run {int(images[0])}")

    queue = ThreadQueue(run, 2)
    waits = [queue.start(np.array([float(number)])) for number in range(4)]
    for number, wait in enumerate(waits):
        with pytest.raises(ValueError, match=f"run {number}"):
            wait()
    queue.close()
