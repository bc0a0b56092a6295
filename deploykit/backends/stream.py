"""A stream of frames through an engine: several in flight, answers in order, no more frames taken than have room."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from deploykit.arguments import shown
from deploykit.errors import SpecError
from deploykit.feature_dict import Features

if TYPE_CHECKING:
    from deploykit.arrays import ImageArray, Images
    from deploykit.backends.runtime import Runtime

Frame = TypeVar("Frame")

MOST_IN_FLIGHT = 1024
MOST_IN_BATCH = 16
"""How many images `mapped` puts into a call where the engine takes any number."""


def streamed(engine: Runtime, frames: Iterable[Images], in_flight: int | None) -> Iterator[Any]:
    """Yield what the engine gives for each frame, in their order; see `Runtime.stream`."""
    room, coming = checked_in_flight(in_flight, engine.in_flight), reader_of(frames)
    queue = engine.open_queue(room)
    waiting: deque[Callable[[], Any]] = deque()
    fault: Exception | None = None
    try:
        while fault is None:
            try:
                begun, computed = perf_counter(), thread_time()
                frame = next(coming)
                queue.source_blocked(perf_counter() - begun - (thread_time() - computed))
                waiting.append(engine.start(queue, frame))
            except StopIteration:
                break
            except Exception as error:  # of the reader, or a frame that is refused: first the answers before it
                fault = error
            if len(waiting) == room:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()
        if fault is not None:
            raise fault
    finally:
        queue.close()


def mapped(engine: Runtime, images: Iterable[ImageArray], in_flight: int | None) -> Iterator[Any]:
    """Yield what the engine gives for each single image, in their order; see `Runtime.map`."""
    batch = engine.input_spec.batch
    most = batch if isinstance(batch, int) else min(batch.max, max(batch.opt, batch.min, MOST_IN_BATCH))
    least = batch if isinstance(batch, int) else batch.min
    sizes: deque[int] = deque()
    for outputs in streamed(engine, _batches(images, least, most, sizes), in_flight):
        for position in range(sizes.popleft()):
            yield _one(outputs, position)


def _batches(images: Iterable[ImageArray], least: int, most: int, sizes: deque[int]) -> Iterator[ImageArray]:
    """Cut single images into batches of one size; one that is too small repeats its images."""
    pending: list[ImageArray] = []
    for each in reader_of(images):
        image = np.array(each)  # a copy: a reader may fill its buffer again
        if pending and image.shape != pending[0].shape:
            sizes.append(len(pending))
            yield _filled(pending, least)
            pending = []
        pending.append(image)
        if len(pending) == most:
            sizes.append(most)
            yield np.stack(pending)
            pending = []
    if pending:
        sizes.append(len(pending))
        yield _filled(pending, least)


def _filled(images: list[ImageArray], least: int) -> ImageArray:
    return np.stack([images[index % len(images)] for index in range(max(least, len(images)))])


def _one(outputs: Any, position: int) -> Any:
    if isinstance(outputs, Features):
        return outputs.map(lambda output: output[position])
    return outputs[position]


def reader_of(frames: Iterable[Frame]) -> Iterator[Frame]:
    """Return what gives frame after frame.

    Raises:
        SpecError: nothing that a loop could read; of asynchronous readers, how to read them.
    """
    try:
        return iter(frames)
    except TypeError as error:
        remedy = (
            "Fix: await asyncio.to_thread(model, frame) for each frame of the asynchronous reader."
            if hasattr(frames, "__aiter__")
            else "Give a list, a generator, or an array whose first axis counts the frames."
        )
        raise SpecError(
            f"the frames are {shown(frames)}; expected something that gives frame after frame. {remedy}"
        ) from error


def checked_in_flight(asked: int | None, own: int) -> int:
    """Return how many runs may go on at a time.

    Raises:
        SpecError: no number of runs.
    """
    if asked is None:
        return own
    if isinstance(asked, bool) or not isinstance(asked, (int, np.integer)) or not 1 <= asked <= MOST_IN_FLIGHT:
        raise SpecError(f"in_flight is {asked!r}; expected how many runs may go on at a time, 1 to {MOST_IN_FLIGHT}.")
    return int(asked)
