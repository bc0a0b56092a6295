"""``deploykit run``: image files through a bundle's engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli.output import BundleArgument, DeviceOption, JsonFlag, show, show_json, table
from deploykit.errors import BundleError, SpecError
from deploykit.labels import LABELS_FILE

if TYPE_CHECKING:
    from deploykit.arrays import FloatArray
    from deploykit.backends.runtime import Runtime
    from deploykit.spec import CropMode, InputSpec

EXAMPLE = f"Example: deploykit run resnet18-{EVALUATOR}-fp32 photo.jpg"
CHUNK = 64
"""Images decoded at a time, which bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One class of the top K; ``probability`` is the softmax of the logits, 0 to 1."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class OutputSummary:
    """One output of one image: its shape without the batch, and the mean and standard deviation of its values."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """What the engine gives for one file: the top K of a classifier, or a summary of each other output."""

    image: str
    top: tuple[Prediction, ...] = ()
    outputs: tuple[OutputSummary, ...] = ()


def run(
    bundle: BundleArgument,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Image files, or folders: every image below them.")
    ],
    *,
    top: Annotated[int, typer.Option("--top", metavar="K", help="How many classes to print for an image.")] = 5,
    crop_mode: Annotated[
        str | None,
        typer.Option(
            "--crop-mode",
            metavar="center|squash|border",
            show_default="as the manifest says",
            help="How a photograph becomes the input's size.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    json: JsonFlag = False,
) -> None:
    """Preprocess images as the manifest says, run them, and print the best classes or the features' figures."""
    from deploykit.facade import load_bundle

    if top < 1:
        raise SpecError(f"--top is {top}; give at least 1.")
    files = find_images(images)
    with load_bundle(bundle, device=device) as model:
        spec = _with_crop_mode(model.input_spec, crop_mode)
        labels = read_labels(Path(bundle), model.manifest.backbone.num_classes)
        results = list(_results(model, files, spec, labels=labels, top=top))
        about = {"bundle": bundle, "runtime": model.runtime, "precision": model.precision.name, "device": model.device}
    if json:
        show_json({**about, "images": results})
        return
    show(_as_table(results), f"{about['runtime']} {about['precision']} on {about['device']}; images: {len(results)}.")
    show(f"Next: deploykit verify {bundle}")


def find_images(given: list[str]) -> list[Path]:
    """Every file as it is, and every image below each folder, in order.

    Raises:
        SpecError: a folder without images, or a path that is not there; each one is named.
    """
    from deploykit.calibration.images import IMAGE_SUFFIXES

    files: list[Path] = []
    problems = []
    for text in given:
        path = Path(text)
        if not path.is_dir():
            files.append(path)
            problems += [] if path.exists() else [f"{text}: no such file or folder."]
            continue
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        files += inside
        problems += [] if inside else [f"{text}: no image files in the folder ({', '.join(sorted(IMAGE_SUFFIXES))})."]
    if problems:
        raise SpecError("\n".join(problems))
    return files


def read_labels(folder: Path, num_classes: int) -> tuple[str, ...] | None:
    """The bundle's class names in index order; None where it has none.

    Raises:
        BundleError: not one name for each class.
    """
    path = folder / LABELS_FILE
    if not path.is_file():
        return None
    labels = tuple(path.read_text(encoding="utf-8").splitlines())
    if len(labels) != num_classes:
        raise BundleError(
            f"{path} has {len(labels)} names and the model {num_classes} classes. Export the bundle again."
        )
    return labels


def _with_crop_mode(spec: InputSpec, crop_mode: str | None) -> InputSpec:
    if crop_mode is None:
        return spec
    return replace(spec, preprocessing=replace(spec.preprocessing, crop_mode=cast("CropMode", crop_mode)))


def _results(
    model: Runtime, files: list[Path], spec: InputSpec, *, labels: tuple[str, ...] | None, top: int
) -> Iterator[ImageResult]:
    from deploykit.backends.runtime import run_in_batches
    from deploykit.calibration.images import load_images

    is_classifier = not model.manifest.backbone.features_only and model.manifest.backbone.num_classes > 0
    for start in range(0, len(files), CHUNK):
        chunk = files[start : start + CHUNK]
        outputs = run_in_batches(model, load_images(chunk, spec))
        for position, file in enumerate(chunk):
            own = {name: output[position] for name, output in outputs.items()}
            if is_classifier:
                (logits,) = own.values()
                yield ImageResult(image=str(file), top=top_classes(logits, labels, top))
            else:
                yield ImageResult(image=str(file), outputs=tuple(_summary(name, out) for name, out in own.items()))


def top_classes(logits: FloatArray, labels: tuple[str, ...] | None, count: int) -> tuple[Prediction, ...]:
    """The ``count`` most probable classes of ``(num_classes,)`` logits, best first."""
    import numpy as np

    shifted = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = shifted / shifted.sum()
    best = np.argsort(-probabilities, kind="stable")[:count]
    return tuple(
        Prediction(
            index=int(index),
            label=labels[index] if labels else f"class {index}",
            probability=float(probabilities[index]),
        )
        for index in best
    )


def _summary(name: str, output: Any) -> OutputSummary:
    import numpy as np

    values = output.astype(np.float64)
    return OutputSummary(name=name, shape=tuple(output.shape), mean=float(values.mean()), std=float(values.std()))


def _as_table(results: list[ImageResult]) -> Any:
    """One row a class, or one row an output; the file's name stands in its first row."""
    rows: list[list[str]] = []
    for result in results:
        of_image = [[str(each.index), each.label, f"{each.probability:.1%}"] for each in result.top]
        of_image += [
            [each.name, " x ".join(map(str, each.shape)), f"{each.mean:.4g}", f"{each.std:.4g}"]
            for each in result.outputs
        ]
        rows += [["" if position else result.image, *row] for position, row in enumerate(of_image)]
    if results[0].top:
        return table(("image", "class", "label", "probability"), rows, right=("class", "probability"))
    return table(("image", "output", "shape", "mean", "std"), rows, right=("mean", "std"))
