"""``deploykit demo``: one pretrained backbone, four engines, and the numbers that prove them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from deploykit.backends.table import engine_names, load_backend
from deploykit.cli.output import JsonFlag, show, show_json, show_warning, stderr_console, table
from deploykit.cli.progress import export_progress
from deploykit.errors import DeviceUnavailable, MissingDependency
from deploykit.output_places import check_outside_bundles

if TYPE_CHECKING:
    from deploykit.export.pipeline import ExportResult

EXAMPLE = "Example: deploykit demo --output demo-output"

BACKBONE = "efficientnet_lite0"
CALIBRATION = "calibration"
SHOWN = ("chelsea.png", "coffee.png", "rocket.jpg")
"""The photographs whose labels are printed; none is calibrated on."""
CALIBRATED = ("astronaut.png", "motorcycle_left.png", "ihc.png", "hubble_deep_field.jpg", "retina.jpg")
CROPS = 60


@dataclass(frozen=True, kw_only=True)
class DemoEngine:
    """One engine of the demo."""

    runtime: str
    precision: str

    @property
    def name(self) -> str:
        """The name of its folder and its column."""
        return f"{self.runtime}-{self.precision}"


def demo_engines() -> tuple[DemoEngine, ...]:
    """Name the engines that the runtimes' descriptors list for the demo."""
    backends = map(load_backend, engine_names())
    return tuple(
        DemoEngine(runtime=backend.name, precision=precision) for backend in backends for precision in backend.demo
    )


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder for the photographs and the four bundles.")
    ] = Path("demo-output"),
    json: JsonFlag = False,
) -> None:
    """Export EfficientNet-Lite0 with its ImageNet weights to four engines, and print what each one gives.

    Calibrates on crops of scikit-image's photographs and shows three others that it was not calibrated on.
    """
    from deploykit.facade import create_backbone
    from deploykit.images.preprocess import load_images
    from deploykit.labels import class_labels

    check_outside_bundles(output / CALIBRATION)
    engines = demo_engines()
    photographs = photograph_folder()
    crops = write_crops(photographs, output / CALIBRATION)
    torch_model: Any = create_backbone(BACKBONE, pretrained=True)
    images = load_images([photographs / name for name in SHOWN], torch_model.input_spec)
    labels = class_labels(torch_model.spec.label_set) or ()
    columns = {"torch-fp32": [_label(torch_model(image[None]), labels) for image in images]}
    exports = {}
    for engine in engines:
        result, seconds = _export(engine, output / engine.name, crops)
        if not json:
            show(result.parity.render(), f"{engine.name}: {result.status} in {seconds:.0f} s, {result.folder}\n")
        columns[engine.name] = _labels_of(result.folder, images, labels)
        exports[engine.name] = {"bundle": str(result.folder), "status": result.status, "parity": result.parity}
    if json:
        show_json({"photos": SHOWN, "top1": columns, "engines": exports})
        return
    rows = ([Path(name).stem, *(column[row] for column in columns.values())] for row, name in enumerate(SHOWN))
    show(table(["photo", *columns], rows, title=f"top-1 of {BACKBONE}, with its probability"))
    show(f"\nNext: deploykit verify {output / engines[0].name}")


def write_crops(photographs: Path, folder: Path, *, count: int = CROPS) -> Path:
    """Write square crops, half to all of the short side, at random places from a fixed seed."""
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        name = CALIBRATED[number % len(CALIBRATED)]
        with Image.open(photographs / name) as photograph:
            side = int(min(photograph.size) * generator.uniform(0.5, 1.0))
            left, top = (int(generator.integers(0, length - side + 1)) for length in photograph.size)
            crop = photograph.convert("RGB").crop((left, top, left + side, top + side))
        crop.resize((256, 256)).save(folder / f"{number:03d}-{Path(name).stem}.png")
    return folder


def _export(engine: DemoEngine, folder: Path, crops: Path) -> tuple[ExportResult, float]:
    """Export one engine, and return what it is and the seconds that it took."""
    from deploykit.facade import export_backbone

    stderr_console().print(f"\n{engine.name}", style="bold")
    start = monotonic()
    with export_progress() as progress:
        result = export_backbone(
            BACKBONE,
            folder,
            runtime=engine.runtime,
            precision=engine.precision,
            calibration=crops,
            pretrained=True,
            overwrite=True,
            progress=progress,
        )
    return result, monotonic() - start


def _labels_of(folder: Path, images: Any, labels: tuple[str, ...]) -> list[str]:
    """Label the photographs with an engine, or say that it does not run here."""
    from deploykit.loading import load_bundle

    try:
        with load_bundle(folder) as model:
            return [_label(model(image[None]), labels) for image in images]
    except (DeviceUnavailable, MissingDependency) as error:
        show_warning(f"{folder.name}: {error}")
        return ["built, not run here"] * len(images)


def _label(logits: object, labels: tuple[str, ...]) -> str:
    """Return ``"285 Egyptian cat 0.75"`` from ``(1, classes)`` logits."""
    scores = np.asarray(logits, np.float64)[0]
    shares = np.exp(scores - scores.max())
    best = int(scores.argmax())
    return f"{best} {labels[best] if labels else ''} {shares[best] / shares.sum():.2f}"


def photograph_folder() -> Path:
    """Return where scikit-image keeps its photographs."""
    from deploykit.optional import require

    return Path(require("skimage").data_dir)
