"""OpenVINO's asynchronous infer requests, used in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import numpy as np

from deploykit.arrays import FloatArray, ImageArray
from deploykit.backends.openvino.protocols import CompiledModel, InferRequest, OVTensor
from deploykit.backends.run_queue import Wait


class RequestQueue:
    """A ring of infer requests, each with memory of its own for images; OpenVINO's own scheduler runs them.

    Args:
        compiled: the model.
        outputs: the positions of the manifest's outputs.
        in_flight: how many requests there are.
        tensor: makes an OpenVINO tensor of an array's memory.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        outputs: Sequence[int],
        in_flight: int,
        tensor: Callable[[ImageArray], OVTensor],
    ) -> None:
        self._outputs = tuple(outputs)
        self._requests = [_Request(compiled.create_infer_request(), tensor) for _ in range(in_flight)]
        self._next = 0

    def start(self, images: ImageArray) -> Wait:
        """See `RunQueue.start`."""
        request = self._requests[self._next]
        self._next = (self._next + 1) % len(self._requests)
        request.start(images)
        return partial(request.answer, self._outputs)

    def source_blocked(self, seconds: float) -> None:
        """See `RunQueue.source_blocked`; OpenVINO's threads are its own, and compute meanwhile."""

    def close(self) -> None:
        """See `RunQueue.close`."""
        for request in self._requests:
            with suppress(RuntimeError):  # of a run that failed, whose caller has it already
                request.answer(())
        self._requests.clear()


class _Request:
    """An infer request that reads one array, into which images are copied.

    The binding's own hand-over of inputs looks at their types anew for each run, which costs as much as a tenth of a
    millisecond.
    """

    def __init__(self, request: InferRequest, tensor: Callable[[ImageArray], OVTensor]) -> None:
        self._request = request
        self._tensor = tensor
        self._images: ImageArray | None = None

    def start(self, images: ImageArray) -> None:
        """Start a run on a copy of the images."""
        if self._images is None or self._images.shape != images.shape:
            self._images = np.empty(images.shape, images.dtype)
            self._request.set_input_tensor(self._tensor(self._images))
        np.copyto(self._images, images)
        self._request.start_async()

    def answer(self, outputs: Sequence[int]) -> list[FloatArray]:
        """Wait for the run, and return copies of these outputs."""
        self._request.wait()
        return [np.array(self._request.get_output_tensor(position).data) for position in outputs]
