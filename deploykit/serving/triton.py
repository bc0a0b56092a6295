"""A model of a Triton model repository: ``NAME/config.pbtxt`` and ``NAME/VERSION/`` with the engine's files.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from deploykit.backends.backend import Serving
from deploykit.labels import LABELS_FILE
from deploykit.manifest import Manifest
from deploykit.spec import BatchRange

CONFIG = "config.pbtxt"
PYTHON_MODEL = "model.py"

QUEUE_MICROSECONDS = 500
"""How long a request waits for others to share a call with."""

_TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}


def triton_config(manifest: Manifest, serving: Serving, name: str, *, python: bool = False) -> str:
    """Return the text of ``config.pbtxt``.

    An engine that takes any number of images from 1 on gets dynamic batching; any other has its batch in its shapes,
    and ``max_batch_size`` 0. The warm-up runs it once before the server is ready.

    Args:
        manifest: of the bundle.
        serving: what servers call the runtime.
        name: of the model.
        python: let Triton's Python backend call deploykit, in place of the runtime's own backend.
    """
    backend = "python" if python else str(serving.triton_backend)
    parameters = {} if python else serving.triton_parameters
    batching = _batching(manifest)
    on_gpu = _device(manifest) != "cpu"
    blocks = [
        f"name: {_text(name)}",
        f"backend: {_text(backend)}",
        f"default_model_filename: {_text(PYTHON_MODEL if python else PurePosixPath(manifest.engine).name)}",
        f"max_batch_size: {batching.max if batching else 0}",
        *_tensors(manifest, batched=batching is not None),
        *_dynamic_batching(batching),
        f"instance_group [ {{ count: 1, kind: {'KIND_GPU' if on_gpu else 'KIND_CPU'} }} ]",
        *_warm_up(manifest, batching),
        *(
            f"parameters {{ key: {_text(key)}, value: {{ string_value: {_text(value)} }} }}"
            for key, value in parameters.items()
        ),
    ]
    return "\n".join(blocks) + "\n"


def _batching(manifest: Manifest) -> BatchRange | None:
    """Return the range of an engine that takes any batch from 1 on, which is what Triton's batching may send."""
    batch = manifest.input.batch
    return batch if isinstance(batch, BatchRange) and batch.min == 1 and batch.max > 1 else None


def _device(manifest: Manifest) -> str:
    made_for = manifest.made_for
    device = made_for.device if made_for is not None and made_for.device != "auto" else manifest.seen_on.get("device")
    return (device or "cpu").partition(":")[0].partition(".")[0].lower()


def _tensors(manifest: Manifest, *, batched: bool) -> Iterator[str]:
    spec = manifest.input
    first = [] if batched else [spec.batch if isinstance(spec.batch, int) else -1]
    sides = [*first, *(side if isinstance(side, int) else -1 for side in spec.shape[1:])]
    yield f"input [ {{ name: {_text(spec.name)}, data_type: {_TYPES[spec.dtype]}, dims: {_dims(sides)} }} ]"
    labels = LABELS_FILE in manifest.files and not manifest.backbone.features_only
    outputs = []
    for output in manifest.outputs:
        shape = [side if isinstance(side, int) else -1 for side in output.shape]
        sides = shape[1:] if batched else [*first, *shape[1:]]
        labelled = f", label_filename: {_text(LABELS_FILE)}" if labels else ""
        outputs.append(f"  {{ name: {_text(output.name)}, data_type: TYPE_FP32, dims: {_dims(sides)}{labelled} }}")
    yield "output [\n" + ",\n".join(outputs) + "\n]"


def _dynamic_batching(batching: BatchRange | None) -> Iterator[str]:
    if batching is not None:
        preferred = sorted({batching.opt, batching.max} - {1})
        yield (
            f"dynamic_batching {{ preferred_batch_size: {_dims(preferred)}, "
            f"max_queue_delay_microseconds: {QUEUE_MICROSECONDS} }}"
        )


def _warm_up(manifest: Manifest, batching: BatchRange | None) -> Iterator[str]:
    """Yield a request for batch 1, and for the batch that the engine is tuned for.

    Black images, because Triton's random ones are random bits, among them NaN, which deploykit refuses.
    """
    spec = manifest.input
    sides = list(spec.shape_at(spec.best_batch)[1:])
    if batching is None:
        sides = [spec.best_batch, *sides]
    for size in sorted({1, batching.opt}) if batching is not None else (1,):
        value = f"data_type: {_TYPES[spec.dtype]}, dims: {_dims(sides)}, zero_data: true"
        yield (
            f"model_warmup [ {{ name: {_text(f'batch {size}')}, batch_size: {size}, "
            f"inputs {{ key: {_text(spec.name)}, value: {{ {value} }} }} }} ]"
        )


def _dims(sides: Sequence[int]) -> str:
    return f"[ {', '.join(map(str, sides))} ]"


def _text(value: str) -> str:
    """Quote a string as the text format of protocol buffers has it, which for ASCII is JSON's."""
    return json.dumps(value, ensure_ascii=True)
