"""Calls timed in turns, so that a comparison holds while the machine's speed drifts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter, sleep

ROUNDS = 60
LEAST_ROUNDS = 7
SECONDS = 2.0
"""A comparison ends after `ROUNDS` rounds, or after this time and `LEAST_ROUNDS`."""
PAUSE = 0.02
"""Seconds before a call, by which the threads of the model before it are asleep."""


def time_calls(calls: Sequence[Callable[[], object]]) -> tuple[list[float], int]:
    """Return the median milliseconds of each call, made in turns, and the rounds it took.

    Before each call there is a pause, and a call that is not timed: a runtime's threads wait actively for a
    while after a call, and would take a core from the next model.
    """
    for call in (*calls, *calls):
        call()
    times: list[list[float]] = [[] for _ in calls]
    start = perf_counter()
    while len(times[0]) < ROUNDS and (len(times[0]) < LEAST_ROUNDS or perf_counter() - start < SECONDS):
        for call, taken in zip(calls, times, strict=True):
            sleep(PAUSE)
            call()
            before = perf_counter()
            call()
            taken.append(1e3 * (perf_counter() - before))
    return [median(taken) for taken in times], len(times[0])
