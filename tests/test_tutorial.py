"""A network of the user's own, from training in plain PyTorch to class names on a device, in eight forms of file.

Digits are drawn in ten class folders, whose names do not sort as the digits do. A small network is trained on them
for a few seconds, in torch alone, and saved as training scripts save it.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import nn

from deploykit import create_backbone, load_images
from deploykit.errors import WeightsWarning
from deploykit.spec import InputSpec, Preprocessing
from tests.cli.conftest import call
from tests.small_resnet import SMALL

NAME, SIDE = SMALL, 32
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FOLDERS = tuple(sorted(CLASSES))
"""The order of the classes: torchvision's ImageFolder sorts them."""
HOW = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=1.0)
SPEC = InputSpec(height=SIDE, width=SIDE, preprocessing=HOW)
TRAINED_ON, TESTED_ON = 40, 10
"""Images of each class."""


def draw(digit: int, generator: np.random.Generator) -> Image.Image:
    """A digit of random size, place, turn and colours, in noise."""
    paper, ink = int(generator.integers(0, 90)), int(generator.integers(170, 256))
    image = Image.new("L", (48, 48), paper)
    place = tuple(float(value) for value in 24 + generator.uniform(-3, 3, 2))
    font = ImageFont.load_default(size=float(generator.uniform(32, 40)))
    ImageDraw.Draw(image).text(place, str(digit), ink, font=font, anchor="mm")
    turned = image.rotate(float(generator.uniform(-10, 10)), Image.Resampling.BILINEAR, fillcolor=paper)
    noisy = np.asarray(turned, np.float32) + generator.normal(0, 8, (48, 48))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Tutorial:
    """The trained network, its images in class folders, and what it says of the test images."""

    state: dict[str, torch.Tensor]
    untrained: dict[str, torch.Tensor]
    train: Path
    test: Path
    files: tuple[Path, ...]
    images: torch.Tensor
    logits: torch.Tensor

    @property
    def truth(self) -> list[str]:
        return [file.parent.name for file in self.files]

    @property
    def correct(self) -> int:
        """How many of the test images torch names rightly."""
        found = [FOLDERS[index] for index in self.logits.argmax(1)]
        return sum(one == other for one, other in zip(found, self.truth, strict=True))


def write_images(folder: Path, count: int, generator: np.random.Generator) -> Path:
    for digit, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            draw(digit, generator).save(folder / name / f"{number}.jpg", quality=92)
    return folder


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory) -> Tutorial:
    root = tmp_path_factory.mktemp("tutorial")
    generator = np.random.default_rng(0)
    train = write_images(root / "train", TRAINED_ON, generator)
    test = write_images(root / "test", TESTED_ON, generator)
    files = sorted(train.glob("*/*.jpg"))
    images = torch.from_numpy(load_images(files, SPEC))
    classes = torch.tensor([FOLDERS.index(file.parent.name) for file in files])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = create_backbone(NAME, num_classes=10, image_size=SIDE)
        untrained = {name: value.clone() for name, value in model.state_dict().items()}
        fit_once(model, images, classes, tmp_path_factory)
    tested = tuple(sorted(test.glob("*/*.jpg")))
    photographs = torch.from_numpy(load_images(tested, SPEC))
    with torch.no_grad():
        logits = model.eval()(photographs)
    return Tutorial(
        state=model.state_dict(),
        untrained=untrained,
        train=train,
        test=test,
        files=tested,
        images=photographs,
        logits=logits,
    )


def fit_once(model: nn.Module, images: torch.Tensor, classes: torch.Tensor, factory: pytest.TempPathFactory) -> None:
    """Train in one test process, and take its weights in the others."""
    shared = "PYTEST_XDIST_WORKER" in os.environ
    weights = (factory.getbasetemp().parent if shared else factory.mktemp("trained")) / "tutorial.pth"
    with FileLock(f"{weights}.lock"):
        if not weights.exists():
            fit(model, images, classes)
            torch.save(model.state_dict(), weights)
    model.load_state_dict(torch.load(weights, weights_only=True))


def fit(model: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> None:
    """Twelve passes in plain PyTorch, after which hardly an image lies near the border of two classes."""
    passes, batch_size = 12, 25
    optimizer = torch.optim.AdamW(model.parameters())
    steps = passes * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    model.train()
    for _ in range(passes):
        for batch in torch.randperm(len(images)).split(batch_size):
            loss = nn.functional.cross_entropy(model(images[batch]), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def lightning(one: Tutorial) -> dict[str, Any]:
    return {
        "epoch": 5,
        "global_step": 72,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed("model.", one.state),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}],
        "hyper_parameters": {"lr": 1e-3, "data": Path("train")},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.98)}},
    }


FORMS: dict[str, Callable[[Tutorial, Path], Any]] = {
    "plain.pth": lambda one, path: torch.save(one.state, path),
    "wrapped.pth.tar": lambda one, path: torch.save(
        {"state_dict": one.state, "epoch": 5, "best": np.float64(0.9)}, path
    ),
    "ema.pth": lambda one, path: torch.save({"state_dict": one.untrained, "state_dict_ema": one.state}, path),
    "parallel.pt": lambda one, path: torch.save({"model": prefixed("module.", one.state)}, path),
    "compiled.bin": lambda one, path: torch.save(prefixed("_orig_mod.", one.state), path),
    "lightning.ckpt": lambda one, path: torch.save(lightning(one), path),
    "half.safetensors": lambda one, path: save_file(
        {name: value.half() if value.is_floating_point() else value for name, value in one.state.items()}, str(path)
    ),
    "arguments.pth": lambda one, path: torch.save(
        {"arch": NAME, "state_dict": one.state, "args": argparse.Namespace(lr=1e-3, data=Path("train"))}, path
    ),
}


@pytest.fixture
def checkpoint(tutorial, tmp_path, request) -> Path:
    path = tmp_path / request.param
    FORMS[request.param](tutorial, path)
    return path


def test_the_network_has_learned(tutorial):
    assert tutorial.correct >= 90


@pytest.mark.parametrize("checkpoint", FORMS, indirect=True)
def test_every_form_loads_to_the_same_predictions(tutorial, checkpoint):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if checkpoint.name.startswith("ema") else "error", WeightsWarning)
        model: Any = create_backbone(NAME, pretrained=checkpoint, image_size=SIDE)
    with torch.no_grad():
        logits = model(tutorial.images)
    assert torch.equal(logits.argmax(1), tutorial.logits.argmax(1))
    if not checkpoint.name.startswith("half"):
        assert torch.equal(logits, tutorial.logits)


def export_and_run(tutorial: Tutorial, checkpoint: Path, runtime: str, bundle: Path) -> list[dict[str, Any]]:
    """Export a checkpoint at INT8 by the command, and run the test images through it."""
    how = ("--mean", 0.5, "--std", 0.25, "--interpolation", "bilinear", "--crop-pct", 1)
    engine = ("--runtime", runtime, "--precision", "int8", "--calibration", tutorial.train, "--no-speed", "-o", bundle)
    words = (checkpoint, "--backbone", NAME, "--image-size", SIDE, *how, *engine)
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert not [word for word in words if str(word).startswith("-") and str(word) not in readme]
    done = call("export", *words)
    assert done.code == 0, done.err
    assert "Class names: eight, five, four, nine" in done.out
    ran = call("run", bundle, tutorial.test, "--top", 1, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)["images"]


def check_predictions(tutorial: Tutorial, results: list[dict[str, Any]]) -> None:
    """The engine names as many images rightly as torch, within one."""
    found = {result["image"]: result["top"][0]["label"] for result in results}
    assert set(found) == set(map(str, tutorial.files))
    correct = sum(found[str(file)] == name for file, name in zip(tutorial.files, tutorial.truth, strict=True))
    assert abs(correct - tutorial.correct) <= 1


@pytest.mark.parametrize(
    ("checkpoint", "runtime"),
    [
        pytest.param(
            form,
            runtime,
            marks=() if (form, runtime) == ("lightning.ckpt", "onnxruntime") else pytest.mark.slow,
        )
        for form in FORMS
        for runtime in ("onnxruntime", "openvino")
    ],
    indirect=["checkpoint"],
)
def test_an_engine_names_the_photographs_as_torch_does(tutorial, checkpoint, runtime, tmp_path):
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    results = export_and_run(tutorial, checkpoint, runtime, tmp_path / "bundle")
    check_predictions(tutorial, results)
    table = call("run", tmp_path / "bundle", tutorial.files[0], "--top", 1)
    assert any(name in table.out for name in CLASSES)
