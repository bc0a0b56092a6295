"""Opens ``model.onnx`` in onnx's reference evaluator."""

from typing import Any

from deploykit.arrays import FloatArray
from deploykit.backends.engine_file import EngineFile
from deploykit.backends.runtime import Runtime
from deploykit.errors import DeviceUnavailable
from deploykit.optional import require


class OnnxReference(Runtime):
    """One evaluator, which keeps no state between calls."""

    def _open(self, engine: EngineFile, device: str) -> str:
        if device not in ("auto", "cpu"):
            raise DeviceUnavailable(f"the reference evaluator has no device {device!r}; it has cpu.")
        self._evaluator: Any = require("onnx.reference").ReferenceEvaluator(str(engine))
        return "cpu"

    def _run(self, images: FloatArray) -> list[FloatArray]:
        return list(self._evaluator.run(list(self._output_names), {self.input_spec.name: images}))

    def _close(self) -> None:
        self._evaluator = None

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """The CPU."""
        return ("cpu",)
