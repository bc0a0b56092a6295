"""A call that runs one ahead: its order, what is raised, and what is kept."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

from deploykit.calibration.one_ahead import one_ahead


def test_results_come_in_order_with_their_items():
    assert list(one_ahead(lambda number: number**2, iter(range(5)))) == [(n, n**2) for n in range(5)]
    assert list(one_ahead(abs, [])) == []
    assert list(one_ahead(abs, [-1])) == [(-1, 1)]


def test_the_next_call_runs_while_a_result_is_used():
    begun = [threading.Event() for _ in range(3)]

    def call(number):
        begun[number].set()
        return number

    results = one_ahead(call, range(3))
    next(results)
    assert begun[1].wait(30)
    assert not begun[2].is_set()
    assert [item for item, _ in results] == [1, 2]


def test_what_a_call_or_an_item_raises_is_raised_in_its_turn():
    def call(number):
        if number == 2:
            raise ValueError("two")
        return number

    def items():
        yield 0
        yield 1
        raise KeyError("no third item")

    taken = []
    with pytest.raises(ValueError, match="two"):
        taken.extend(item for item, _ in one_ahead(call, range(5)))
    results = one_ahead(call, items())
    assert next(results) == (0, 0)
    with pytest.raises(KeyError, match="no third"):
        next(results)


def test_a_result_is_kept_no_longer_than_it_is_used():
    kept = []

    def call(number):
        made = np.zeros(3)
        kept.append(weakref.ref(made))
        return made

    for number, made in one_ahead(call, range(6)):
        del made
        gc.collect()
        assert sum(reference() is not None for reference in kept) <= 1, number
