"""A bundle as a model of Triton's Python backend: opened by `deploykit.load_bundle`, which checks every digest.

Triton imports ``model.py`` of the model repository, which imports this module; nothing else does.
https://github.com/triton-inference-server/python_backend
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import DeployKitError
from deploykit.loading import load_bundle

BUNDLE = "bundle"

MODEL = b'''"""A bundle of deploykit, which is in the folder beside this file."""

from deploykit.serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
"""The text of ``model.py``."""


class TritonPythonModel:
    """A bundle's engine, as Triton's Python backend calls it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle of the version that is loaded."""
        self._triton: Any = importlib.import_module("triton_python_backend_utils")
        folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        self._model = load_bundle(folder)
        self._input = self._model.input_spec.name
        self._batched = '"max_batch_size":0' not in args["model_config"].replace(" ", "")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests, those that Triton batches in one run of the engine."""
        images = [self._triton.get_input_tensor_by_name(each, self._input).as_numpy() for each in requests]
        if not self._batched:
            return [self._answers(each, [len(each)])[0] for each in images]
        return self._answers(np.concatenate(images), [len(each) for each in images])

    def finalize(self) -> None:
        """Give the engine's memory back."""
        self._model.close()

    def _answers(self, images: Any, sizes: list[int]) -> list[Any]:
        """Run images once, and cut each output into those of the requests."""
        try:
            outputs = self._model(images)
        except DeployKitError as error:
            failed = self._triton.TritonError(str(error))
            return [self._triton.InferenceResponse(output_tensors=[], error=failed) for _ in sizes]
        named = outputs if isinstance(outputs, dict) else {self._model.manifest.outputs[0].name: outputs}
        ends = np.cumsum(sizes)
        return [
            self._triton.InferenceResponse(
                output_tensors=[self._triton.Tensor(name, output[end - size : end]) for name, output in named.items()]
            )
            for size, end in zip(sizes, ends, strict=True)
        ]
