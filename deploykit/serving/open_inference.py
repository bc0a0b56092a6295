"""``model-settings.json`` of MLServer, which serves the Open Inference Protocol and which KServe runs.

https://docs.seldon.ai/mlserver/reference/model-settings
"""

from __future__ import annotations

import msgspec

from deploykit.manifest import Manifest
from deploykit.spec import BatchRange

CONFIG = "model-settings.json"
IMPLEMENTATION = "deploykit.serving.mlserver_model.BundleModel"
BUNDLE = "bundle"

QUEUE_SECONDS = 0.0005
"""How long a request waits for others to share a call with."""

_TYPES = {"float32": "FP32", "uint8": "UINT8"}


def model_settings(manifest: Manifest, name: str, version: int) -> bytes:
    """Return the settings of a model whose bundle lies beside them."""
    spec = manifest.input
    batch = spec.batch if isinstance(spec.batch, int) else -1
    settings: dict[str, object] = {
        "name": name,
        "implementation": IMPLEMENTATION,
        "platform": manifest.runtime,
        "inputs": [{"name": spec.name, "datatype": _TYPES[spec.dtype], "shape": [batch, *_sides(spec.shape[1:])]}],
        "outputs": [
            {"name": output.name, "datatype": "FP32", "shape": [batch, *_sides(output.shape[1:])]}
            for output in manifest.outputs
        ],
        "parameters": {"uri": f"./{BUNDLE}", "version": str(version)},
    }
    if isinstance(spec.batch, BatchRange) and spec.batch.min == 1 and spec.batch.max > 1:
        settings |= {"max_batch_size": spec.batch.max, "max_batch_time": QUEUE_SECONDS}
    return msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n"


def _sides(shape: tuple[int | str, ...]) -> list[int]:
    return [side if isinstance(side, int) else -1 for side in shape]
