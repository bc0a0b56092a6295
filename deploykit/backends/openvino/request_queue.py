"""OpenVINO's asynchronous infer requests, used in turn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from deploykit.arrays import FloatArray, ImageArray
from deploykit.backends.openvino.protocols import CompiledModel
from deploykit.backends.run_queue import Wait


class RequestQueue:
    """A ring of infer requests; OpenVINO's own scheduler runs those that were started.

    Args:
        compiled: the model.
        outputs: the positions of the manifest's outputs.
        in_flight: how many requests there are.
    """

    def __init__(self, compiled: CompiledModel, outputs: Sequence[int], in_flight: int) -> None:
        self._outputs = tuple(outputs)
        self._requests = [compiled.create_infer_request() for _ in range(in_flight)]
        self._next = 0

    def start(self, images: ImageArray) -> Wait:
        """See `RunQueue.start`."""
        request = self._requests[self._next]
        self._next = (self._next + 1) % len(self._requests)
        # The request keeps no reference to shared memory, so that the closure does until the run ends.
        request.start_async([images], share_inputs=images.flags.writeable)

        def wait(held: ImageArray = images) -> list[FloatArray]:
            request.wait()
            return [np.array(request.get_output_tensor(position).data) for position in self._outputs]

        return wait

    def close(self) -> None:
        """See `RunQueue.close`."""
        for request in self._requests:
            with suppress(RuntimeError):  # of a run that failed, whose caller has it already
                request.wait()
        self._requests.clear()
