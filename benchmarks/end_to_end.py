"""From JPEG bytes to features: deploykit beside the usual Python way, in images a second.

The usual way is Pillow's decoder, torchvision's Resize, CenterCrop, ToTensor and Normalize (NumPy where torchvision is
not installed), and the raw runtime's own call, image after image. Ours are the same engine behind `load_images`, the
engine that takes pixels and has mean and std inside, and that engine behind ``model.stream`` with two threads that
decode ahead. JPEGs are decoded by simplejpeg where that is installed, to Pillow's own pixels, and never at a reduced
size: on these photographs a scaled decoder moves the pixels by 36 to 46 dB, which is outside the bar for some.

All ways take turns, a pass over all photographs each. Bar: 1.5 times the images a second of the usual way, the same
numbers to 40 dB.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _from_tests import realistic
from _results import machine_line, parser, save, silence
from _timing import RUNTIMES
from PIL import Image

import deploykit
from deploykit.arrays import FloatArray
from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.registry import build_backbone
from deploykit.cli.demo import CALIBRATED, SHOWN, photograph_folder
from deploykit.images.preprocess import load_images
from deploykit.optional import installed_version, require
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import InputSpec

NETWORK = "mobilenetv3_large_100"
SIZES = ((640, 480), (1280, 960), (2560, 1920))
QUICK_SIZES = ((640, 480), (1280, 960))
USUAL = "usual way"
SPEED_BAR, PARITY_BAR_DB = 1.5, 40.0
DECODERS = 2

Way = Callable[[Sequence[bytes]], list[FloatArray]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way: images a second (the median of the passes), over the usual way's, and dB against its features."""

    runtime: str
    size: tuple[int, int]
    way: str
    images_per_s: float
    ratio: float
    db: float


def photographs(size: tuple[int, int], count: int) -> list[bytes]:
    """JPEG files of a size in pixels, (width, height), quality 90."""
    names, contents = (*CALIBRATED, *SHOWN), []
    for number in range(count):
        with Image.open(photograph_folder() / names[number % len(names)]) as picture:
            scaled = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        written = io.BytesIO()
        scaled.save(written, "JPEG", quality=90)
        contents.append(written.getvalue())
    return contents


def usual_transform(spec: InputSpec) -> Callable[[Image.Image], FloatArray]:
    """What torchvision's users write, or NumPy's where torchvision is not installed; one image, ``(1, 3, H, W)``."""
    how = spec.preprocessing
    short = int(spec.height / how.crop_pct)
    if installed_version("torchvision") is None:
        return lambda picture: _by_numpy(picture, spec, short)
    require("timm")  # declares the operators that torchvision's wheel beside a CPU build of torch lacks
    transforms = require("torchvision.transforms")
    mode = transforms.InterpolationMode(how.interpolation)
    steps = transforms.Compose(
        [
            transforms.Resize(short, interpolation=mode),
            transforms.CenterCrop((spec.height, spec.width)),
            transforms.ToTensor(),
            transforms.Normalize(how.mean, how.std),
        ]
    )
    return lambda picture: np.asarray(steps(picture)[None])


def _by_numpy(picture: Image.Image, spec: InputSpec, short: int) -> FloatArray:
    how, scale = spec.preprocessing, short / min(picture.size)
    width, height = (max(short, round(side * scale)) for side in picture.size)
    left, top = (width - spec.width) // 2, (height - spec.height) // 2
    resized = picture.resize((width, height), Image.Resampling[how.interpolation.upper()])
    pixels = np.asarray(resized.crop((left, top, left + spec.width, top + spec.height)), np.float32) / 255
    normalised = (pixels - np.asarray(how.mean, np.float32)) / np.asarray(how.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1)[None])


def ways_of(backbone: Any, runtime: str, work: Path) -> dict[str, Way]:
    """The usual way and ours, with engines of one network, at FP32."""
    floats, pixels = (work / f"{backbone.spec.name}-{runtime}-fp32-{form}-bundle" for form in ("floats", "pixels"))
    for folder, embedded in ((floats, False), (pixels, True)):
        if not folder.exists():
            deploykit.export_backbone(backbone, folder, runtime=runtime, embed_preprocessing=embedded)
    raw = RUNTIMES[runtime](floats / ("model.onnx" if runtime == "onnxruntime" else "model.xml"))
    transform = usual_transform(backbone.input_spec)
    of_floats, of_pixels = deploykit.load_bundle(floats), deploykit.load_bundle(pixels)
    streaming = deploykit.load_bundle(pixels, hint="throughput")

    def usual(contents: Sequence[bytes]) -> list[FloatArray]:
        return [raw(transform(Image.open(io.BytesIO(content)).convert("RGB")))[0] for content in contents]

    def streamed(contents: Sequence[bytes]) -> list[FloatArray]:
        def frames() -> Iterator[Any]:
            with ThreadPoolExecutor(DECODERS) as pool:
                yield from pool.map(lambda content: load_images(content, streaming.input_spec), contents)

        return list(streaming.stream(frames()))

    return {
        USUAL: usual,
        "load_images": lambda contents: [of_floats(load_images(each, of_floats.input_spec)) for each in contents],
        "pixels in": lambda contents: [of_pixels(load_images(each, of_pixels.input_spec)) for each in contents],
        "stream": streamed,
    }


def measure(ways: dict[str, Way], contents: Sequence[bytes], passes: int) -> dict[str, tuple[float, float]]:
    """Images a second and dB against the usual way's features, by way."""
    answers = {name: np.concatenate(way(contents)) for name, way in ways.items()}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(passes):
        names = list(ways)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            ways[name](contents)
            rates[name].append(len(contents) / (time.perf_counter() - start))
    return {name: (statistics.median(rates[name]), sqnr_db(answers[USUAL], answers[name])) for name in ways}


def report(rows: Sequence[Row]) -> None:
    """Print a row a way."""
    print(f"{'runtime':<12}{'JPEG':<11}{'way':<13}{'images/s':>9}{'of usual':>10}{'dB':>8}")
    for row in rows:
        width, height = row.size
        head = f"{row.runtime:<12}{f'{width}x{height}':<11}{row.way:<13}"
        met = row.ratio >= SPEED_BAR and row.db >= PARITY_BAR_DB
        print(f"{head}{row.images_per_s:9.1f}{row.ratio:10.2f}{min(row.db, 150):8.1f}{'  bar met' if met else ''}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every size in both runtimes."""
    options = parser(__doc__)
    options.add_argument("--network", default=NETWORK, help="default: %(default)s")
    options.add_argument("--images", type=int, help="photographs a pass (default: 48; 24 with --quick)")
    options.add_argument("--passes", type=int, help="of each way (default: 9; 4 with --quick)")
    options.add_argument("--work", type=Path, metavar="FOLDER", help="keep bundles here (default: a temporary folder)")
    asked = options.parse_args(arguments)
    silence()
    torch.manual_seed(0)
    backbone = realistic(build_backbone(asked.network, BackboneOptions(num_classes=0))).eval()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="deploykit-end-to-end-") as scratch:
        for runtime in RUNTIMES:
            ways = ways_of(backbone, runtime, asked.work or Path(scratch))
            for size in QUICK_SIZES if asked.quick else SIZES:
                contents = photographs(size, asked.images or (24 if asked.quick else 48))
                found = measure(ways, contents, asked.passes or (4 if asked.quick else 9))
                usual, _ = found[USUAL]
                rows += [
                    Row(runtime=runtime, size=size, way=way, images_per_s=rate, ratio=rate / usual, db=db)
                    for way, (rate, db) in found.items()
                ]
    print(machine_line())
    decoder = installed_version("simplejpeg")
    by = f"simplejpeg {decoder}" if decoder else "Pillow"
    print(f"{asked.network} FP32, embedding; JPEG by {by}, {DECODERS} threads")
    report(rows)
    save(asked.json, rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    main()
