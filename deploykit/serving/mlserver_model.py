"""A bundle as a model of MLServer: opened by `deploykit.load_bundle`, which checks every digest, and called as it is.

MLServer imports this module by its name in ``model-settings.json``; nothing else does.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.errors import DeployKitError
from deploykit.loading import load_bundle

if TYPE_CHECKING:

    class MLModel:
        """The part of ``mlserver.MLModel`` that is used."""

        name: str
        version: str | None
        settings: Any

else:
    from mlserver import MLModel


class BundleModel(MLModel):
    """A bundle's engine behind the Open Inference Protocol."""

    async def load(self) -> bool:
        """Open the bundle and run it once, so that the first request does not pay for it."""
        from mlserver.utils import get_model_uri

        folder = await get_model_uri(self.settings)
        self._model = await asyncio.to_thread(load_bundle, folder)
        spec = self._model.input_spec
        await asyncio.to_thread(self._model, np.zeros(spec.shape_at(spec.best_batch), spec.dtype))
        return True

    async def predict(self, payload: Any) -> Any:
        """Run the images of a request; each output of the engine is an output of the answer.

        Raises:
            MLServerError: the images are not what the engine takes, with status 400.
        """
        from mlserver.codecs import NumpyCodec
        from mlserver.errors import MLServerError
        from mlserver.types import InferenceResponse

        names = [each.name for each in payload.inputs]
        if names != [self._model.input_spec.name]:
            raise MLServerError(f"the request has the inputs {names}; expected {self._model.input_spec.name!r}", 400)
        images = NumpyCodec.decode_input(payload.inputs[0])
        try:
            outputs = await asyncio.to_thread(self._model, images)
        except DeployKitError as error:
            raise MLServerError(str(error), 400) from error
        named = outputs if isinstance(outputs, dict) else {self._model.manifest.outputs[0].name: outputs}
        return InferenceResponse(
            id=payload.id,
            model_name=self.name,
            model_version=self.version,
            outputs=[NumpyCodec.encode_output(name, output) for name, output in named.items()],
        )

    async def unload(self) -> bool:
        """Give the engine's memory back."""
        self._model.close()
        return True
