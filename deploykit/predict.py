"""Classify images: preprocess them, run a model, and name its most probable classes; the same in every runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from deploykit.arrays import FloatArray, ImageArray
from deploykit.errors import DeployKitError, SpecError
from deploykit.spec import BackboneSpec, InputSpec

if TYPE_CHECKING:
    from deploykit.images.preprocess import SomeImages

BATCH = 4
"""How many images run at once where the model takes any number."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One of the most probable classes; ``probability`` is the softmax of the logits, 0 to 1.

    ``label`` is ``"class 7"`` where the model has no class names.
    """

    index: int
    label: str
    probability: float


class Classifier(Protocol):
    """What `predict` needs of a model."""

    input_spec: InputSpec
    labels: tuple[str, ...] | None

    def __call__(self, images: Any) -> Any:
        """Logits ``(N, num_classes)`` of NumPy images, as ``input_spec`` says."""


def predict(
    model: Classifier, backbone: BackboneSpec, image: SomeImages, top: int = 5
) -> list[Prediction] | list[list[Prediction]]:
    """Name the most probable classes of images.

    Args:
        model: an opened engine, or a backbone in torch.
        backbone: what it is.
        image: one image, or a list of them, as `deploykit.preprocess` takes them.
        top: how many classes to name; all of them where there are fewer.

    Returns:
        The classes of one image, the most probable first; a list of such lists for a list of images.

    Raises:
        ImageError: an image cannot be read.
        SpecError: the model has no classes, or something else than images was given.
        DeployKitError: the model failed, or its logits are NaN or infinite.
    """
    from deploykit.images.preprocess import is_one_image, preprocess

    if isinstance(top, bool) or not isinstance(top, (int, np.integer)) or top < 1:
        raise SpecError(f"top is {top!r}; expected how many classes to name, at least 1.")
    if backbone.features_only or backbone.num_classes < 1:
        raise SpecError(
            f"{backbone.name} gives {', '.join(backbone.output_names)}, and no logits to name classes by. "
            "Fix: call model(images) for its outputs, or build it as a classifier."
        )
    logits = _run(model, preprocess(image, model.input_spec))
    found = [top_classes(row, model.labels, int(top)) for row in logits]
    return found[0] if is_one_image(image) else found


def top_classes(logits: FloatArray, labels: Sequence[str] | None, count: int) -> list[Prediction]:
    """Name the ``count`` most probable classes of ``(num_classes,)`` logits, best first.

    Raises:
        DeployKitError: NaN or infinity among the logits.
    """
    if np.isnan(logits).any() or np.isposinf(logits).any() or not np.isfinite(logits).any():
        raise DeployKitError(
            "the logits hold NaN or infinity, so there are no probabilities. Fix: run deploykit verify on the bundle; "
            "where it was exported at fp16, export it at fp32."
        )
    exact = logits.astype(np.float64)
    shares = np.exp(exact - exact.max())
    probabilities: npt.NDArray[np.float64] = shares / shares.sum()
    best = np.argsort(-exact, kind="stable")[:count]
    return [
        Prediction(
            index=int(index),
            label=labels[index] if labels else f"class {index}",
            probability=float(probabilities[index]),
        )
        for index in best
    ]


def _run(model: Classifier, images: ImageArray) -> FloatArray:
    """The logits of any number of images, in batches that the model takes; a batch too small repeats its images."""
    batch = model.input_spec.batch
    least, most = (batch, batch) if isinstance(batch, int) else (batch.min, min(batch.max, max(batch.min, BATCH)))
    parts = []
    for start in range(0, len(images), most):
        piece = images[start : start + most]
        filled = piece[np.arange(max(least, len(piece))) % len(piece)]
        parts.append(np.asarray(model(filled))[: len(piece)])
    return np.concatenate(parts)
