"""A call for each item in a thread of its own, one ahead of whoever takes what they give."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def one_ahead(call: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yield each item with what ``call`` gives for it, in order; the call for the next one runs meanwhile.

    Items are drawn in the thread that takes the results. What drawing or ``call`` raises is raised there, in its turn.
    """
    with ThreadPoolExecutor(1) as worker:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            waiting.append((item, worker.submit(call, item)))
            if len(waiting) > 1:
                yield _first(waiting)
        if waiting:
            yield _first(waiting)


def _first(waiting: deque[tuple[Item, Future[Result]]]) -> tuple[Item, Result]:
    """Take the oldest call, so that nothing but who asked keeps its result."""
    item, future = waiting.popleft()
    return item, future.result()
