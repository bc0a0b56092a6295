"""``deploykit run``: image files through a bundle's engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli.backbone_options import one_size_of
from deploykit.cli.output import (
    BundleArgument,
    DeviceOption,
    JsonFlag,
    SignedByOption,
    ThreadsOption,
    TrustOption,
    show,
    show_json,
    show_warning,
    table,
)
from deploykit.errors import ImageError, SpecError

if TYPE_CHECKING:
    from rich.table import Table

    from deploykit.arrays import ImageArray
    from deploykit.backends.runtime import Runtime
    from deploykit.predict import Prediction
    from deploykit.spec import CropMode, InputSpec

EXAMPLE = f"Example: deploykit run resnet18-{EVALUATOR}-fp32 photo.jpg"
CHUNK = 64
"""Images decoded at a time, which bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class OutputSummary:
    """One output of one image: its shape without the batch, and the mean and standard deviation of its values."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float


@dataclass(frozen=True, kw_only=True)
class SkippedImage:
    """A file that was not run, and why."""

    image: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """What the engine gives for one file: the top K of a classifier, or a summary of each other output."""

    image: str
    top: tuple[Prediction, ...] = ()
    outputs: tuple[OutputSummary, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Given:
    """The image files of a command line; ``skipped`` is what its folders hold that may have been meant as images."""

    files: tuple[Path, ...]
    skipped: list[SkippedImage] = field(default_factory=list)


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
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            metavar="S|HxW",
            show_default="what the engine is tuned for",
            help="Which size of its range an engine gets the images in.",
        ),
    ] = None,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Go on past images that cannot be read; each is named and counted.")
    ] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    trust: TrustOption = None,
    signed_by: SignedByOption = None,
    json: JsonFlag = False,
) -> None:
    """Preprocess images as the manifest says, run them, and print the best classes or the features' figures."""
    from deploykit.loading import load_bundle

    if top < 1:
        raise SpecError(f"--top is {top}; give at least 1.")
    given = find_given(images)
    with load_bundle(bundle, device=device, threads=threads, trust=trust, signed_by=signed_by) as model:
        spec = model.input_spec if image_size is None else model.input_spec.at(one_size_of(image_size))
        spec = _with_crop_mode(spec, crop_mode)
        results = list(_results(model, given, spec, top=top, skip_corrupt=skip_corrupt))
        about = {"bundle": bundle, "runtime": model.runtime, "precision": model.precision.name, "device": model.device}
    if not results:
        raise ImageError(f"none of the {len(given.files)} images could be read.")
    if json:
        show_json({**about, "images": results, "skipped": given.skipped})
        return
    skipped = f"; skipped: {len(given.skipped)}" if given.skipped else ""
    where = f"{about['runtime']} {about['precision']} on {about['device']}"
    show(_as_table(results), f"{where}; images: {len(results)}{skipped}.")
    show(f"Next: deploykit verify {bundle}")


def find_given(given: list[str]) -> Given:
    """Take every file as it is, and every image below each folder, in order.

    Raises:
        SpecError: a folder without images, or a path that is not there; each one is named.
    """
    from deploykit.images.decode import shown
    from deploykit.images.find import IMAGE_SUFFIXES, find_images

    files: list[Path] = []
    skipped: list[SkippedImage] = []
    problems = []
    for text in given:
        path = Path(text)
        if not path.is_dir():
            files.append(path)
            problems += [] if path.exists() else [f"{shown(text)}: no such file or folder."]
            continue
        inside = find_images(path)
        files += inside.files
        skipped += [SkippedImage(image=shown(e.path), reason=e.reason) for e in inside.left_out if not e.expected]
        expected = ", ".join(sorted(IMAGE_SUFFIXES))
        problems += [] if inside.files else [f"{shown(text)}: no image files in the folder ({expected})."]
    if problems:
        raise SpecError("\n".join(problems))
    for each in skipped:
        show_warning(f"skipped {each.image}: {each.reason}.")
    return Given(files=tuple(files), skipped=skipped)


def _with_crop_mode(spec: InputSpec, crop_mode: str | None) -> InputSpec:
    if crop_mode is None:
        return spec
    return replace(spec, preprocessing=replace(spec.preprocessing, crop_mode=cast("CropMode", crop_mode)))


def _results(model: Runtime, given: Given, spec: InputSpec, *, top: int, skip_corrupt: bool) -> Iterator[ImageResult]:
    import numpy as np

    from deploykit.backends.runtime import run_in_batches
    from deploykit.images.decode import shown
    from deploykit.predict import top_classes

    is_classifier = not model.manifest.backbone.features_only and model.manifest.backbone.num_classes > 0
    for start in range(0, len(given.files), CHUNK):
        images = _read(given.files[start : start + CHUNK], spec, given.skipped, skip_corrupt=skip_corrupt)
        if not images:
            continue
        outputs = run_in_batches(model, np.stack([image for _, image in images]))
        for position, (file, _) in enumerate(images):
            own = {name: output[position] for name, output in outputs.items()}
            if is_classifier:
                (logits,) = own.values()
                yield ImageResult(image=shown(file), top=tuple(top_classes(logits, model.labels, top)))
            else:
                yield ImageResult(image=shown(file), outputs=tuple(_summary(name, out) for name, out in own.items()))


def _read(
    files: tuple[Path, ...], spec: InputSpec, skipped: list[SkippedImage], *, skip_corrupt: bool
) -> list[tuple[Path, ImageArray]]:
    """Return each file with its image; those that cannot be read are added to ``skipped``.

    Raises:
        ImageError: files cannot be read, and are not to be skipped; each one is named.
    """
    from deploykit.images.decode import shown
    from deploykit.images.preprocess import read_image

    images = []
    problems = []
    for file in files:
        try:
            images.append((file, read_image(file, spec)))
        except ImageError as error:
            problems.append(SkippedImage(image=shown(file), reason=str(error)))
    if problems and not skip_corrupt:
        reasons = [each.reason for each in problems]
        raise ImageError("\n".join([*reasons, "To go on past such files, pass skip_corrupt=True."]))
    for each in problems:
        show_warning(f"skipped {each.reason}")
    skipped += problems
    return images


def _summary(name: str, output: Any) -> OutputSummary:
    import numpy as np

    values = output.astype(np.float64)
    return OutputSummary(name=name, shape=tuple(output.shape), mean=float(values.mean()), std=float(values.std()))


def _as_table(results: list[ImageResult]) -> Table:
    """Return one row a class, or one row an output; the file's name stands in its first row."""
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
