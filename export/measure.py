"""What an engine gives against what torch gives in FP32, as a report and as a reference to keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deploykit.arrays import FloatArray, ImageArray
from deploykit.backbones.base import BaseBackbone
from deploykit.backbones.inference_copy import inference_copy
from deploykit.backbones.random_state import kept_random_states
from deploykit.backends.backend import Engine
from deploykit.backends.runtime import Runtime, machine, run_in_batches
from deploykit.backends.table import backend_of
from deploykit.bundle import Manifest
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.torch_half import cast_to_half
from deploykit.calibration.torch_integers import copy_of
from deploykit.errors import DeviceUnavailable, ExportError
from deploykit.graph import Graph, OnnxGraph, TorchProgram
from deploykit.images.preprocess import denormalize
from deploykit.onnx_session import graph_batch, onnx_session
from deploykit.parity.compare import LOGITS, compare
from deploykit.parity.report import ELSEWHERE, LevelParity, ParityReport, simulated
from deploykit.places import scratch_folder
from deploykit.processor import this_processor
from deploykit.spec import InputSpec, Int8, Precision

PARITY_IMAGES = 16
PROXY = "proxy: the same graph, evaluated node by node on the CPU"


def parity_images(calibration: CalibrationSet | None, spec: InputSpec) -> ImageArray:
    """Return `PARITY_IMAGES` images evenly spaced over the calibration set, or synthetic ones where there is none.

    They are what an engine with this input is called with: an engine that embeds the preprocessing
    gets the nearest pixels. The synthetic images have the 1/f amplitude spectrum of photographs
    (Field 1987) from a fixed seed. They show whether a conversion is right; they never set a
    quantization range.
    """
    images = calibration.sample(PARITY_IMAGES) if calibration is not None else synthetic_images(spec)
    return denormalize(images, spec.preprocessing) if spec.embeds_preprocessing else images


def synthetic_images(spec: InputSpec) -> FloatArray:
    """Return `PARITY_IMAGES` images ``(N, C, H, W)`` with the spectrum of photographs; see `parity_images`."""
    generator = np.random.default_rng(0)
    shape = (PARITY_IMAGES, spec.channels, spec.height, spec.width)
    vertical, horizontal = np.fft.fftfreq(spec.height)[:, None], np.fft.rfftfreq(spec.width)[None]
    frequency = np.maximum(np.hypot(vertical, horizontal), 1 / max(spec.height, spec.width))
    noise = np.fft.irfft2(np.fft.rfft2(generator.standard_normal(shape)) / frequency, s=shape[2:])
    noise /= noise.std(axis=(1, 2, 3), keepdims=True)
    return np.ascontiguousarray(noise, np.float32)


def torch_outputs(backbone: BaseBackbone, images: FloatArray) -> dict[str, FloatArray]:
    """Return every level and the head of a backbone in eval mode and FP32 on the CPU, one image at a time.

    Raises:
        ExportError: an output's shape follows the values of the image.
    """
    parts: list[dict[str, Tensor]] = []
    with kept_random_states(), torch.no_grad():
        twin = inference_copy(backbone)
        # torch.tensor copies: a module may work in place on its input.
        parts.extend(twin.forward_everything(torch.tensor(image[None])) for image in images)
    for part in parts:
        for name, output in part.items():
            if output.shape != parts[0][name].shape:
                raise ExportError(
                    f"output {name!r} of {backbone.name} has shape {tuple(parts[0][name].shape)} for one image and "
                    f"{tuple(output.shape)} for another; expected one shape. Fix: leave out of forward what selects by "
                    "values (boolean masks, nonzero, unique)."
                )
    return {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}


def program_outputs(network: TorchProgram, images: ImageArray) -> dict[str, FloatArray]:
    """Return every output of a traced network, for images as it takes them, one batch at a time."""
    module: torch.nn.Module = network.program.module()
    if network.half_except is not None:
        module = cast_to_half(copy_of(network.program), network.half_except)
    batch = network.input.batch
    size = batch if isinstance(batch, int) else 1
    parts = []
    with torch.no_grad():
        for start in range(0, len(images), size):
            part = images[np.arange(start, start + size) % len(images)]
            parts.append([found.numpy()[: len(images) - start] for found in module(torch.from_numpy(part))])
    names = [output.name for output in network.outputs]
    return dict(zip(names, (np.concatenate(column) for column in zip(*parts, strict=True)), strict=True))


def measure(
    manifest: Manifest,
    folder: Path,
    *,
    images: ImageArray,
    expected: dict[str, FloatArray],
    precision: Precision,
    graph: Graph,
    whole: Graph | None,
    lower: Callable[[Graph, Path], Engine],
    elsewhere: bool = False,
) -> tuple[ParityReport, Manifest]:
    """Run an engine where this machine can, and compare every output with torch.

    Args:
        manifest: the engine's, with ``status="built"``.
        folder: where its files are.
        images: to compare on, as the engine takes them.
        expected: torch's outputs in FP32 for every level and the head.
        precision: its budget.
        graph: what the engine was lowered from.
        whole: the same graph with every level as an output. Where it has more of them than the engine,
            it is lowered in the same way and shows the levels inside. None: only what the engine gives.
        lower: the lowering that made the engine.
        elsewhere: the engine is for another machine: what it gives on this one, or in a simulator of its device, is in
            the report, and the status stays ``built``.

    Returns:
        The report, and the manifest with what was seen of the engine and where. Where its device is not here,
        the report holds what the same graph gives node by node on the CPU, marked as a proxy, and the status stays
        ``built``.
    """
    own = ELSEWHERE if elsewhere else "engine"
    try:
        if elsewhere and backend_of(manifest).uses_cpu:
            _check_products(precision)
        levels, seen_on = _levels_of(manifest, folder, images, expected, precision, measured_on=own)
        seen = replace(manifest, seen_on=seen_on)
        if whole is not None and whole.outputs != graph.outputs:
            inner = _compare_lowered(
                manifest, whole, lower, images=images, expected=expected, precision=precision, measured_on="probe"
            )
            levels = (*(level for level in inner if level.name not in {each.name for each in levels}), *levels)
    except DeviceUnavailable:
        seen = replace(manifest, seen_on=machine())
        levels = _proxy_levels(whole or graph, images, expected, precision)
    report = _report(manifest, precision, levels, images=len(images))
    if elsewhere and "simulator" not in seen.seen_on:
        seen = replace(seen, seen_on=machine())
    ran = "device" in seen.seen_on
    return report, replace(seen, status="parity_checked" if report.passed else "executed") if ran else seen


def _proxy_levels(
    graph: Graph, images: ImageArray, expected: dict[str, FloatArray], precision: Precision
) -> tuple[LevelParity, ...]:
    """Compare what a graph gives node by node on the CPU."""
    found = node_by_node(graph, images) if isinstance(graph, OnnxGraph) else program_outputs(graph, images)
    return _compare(found, expected, precision, measured_on=PROXY)


def _report(manifest: Manifest, precision: Precision, levels: tuple[LevelParity, ...], *, images: int) -> ParityReport:
    return ParityReport(
        runtime=manifest.runtime,
        runtime_version=manifest.runtime_version,
        precision=precision.name,
        images=images,
        min_sqnr_db=precision.min_sqnr_db,
        min_top1_agreement=precision.min_top1_agreement,
        levels=levels,
    )


def _compare_lowered(
    manifest: Manifest,
    graph: Graph,
    lower: Callable[[Graph, Path], Engine],
    *,
    images: ImageArray,
    expected: dict[str, FloatArray],
    precision: Precision,
    measured_on: str,
) -> tuple[LevelParity, ...]:
    """Lower a graph into a temporary folder and compare what it gives."""
    with scratch_folder("probe") as scratch:
        engine = lower(graph, scratch)
        probe = replace(
            manifest,
            outputs=graph.outputs,
            engine=engine.file,
            runtime_version=engine.runtime_version,
            requires=engine.requires,
            backbone=replace(manifest.backbone, features_only=True),  # a dict of every output
        )
        return _levels_of(probe, scratch, images, expected, precision, measured_on=measured_on)[0]


def _levels_of(
    manifest: Manifest,
    folder: Path,
    images: ImageArray,
    expected: dict[str, FloatArray],
    precision: Precision,
    *,
    measured_on: str,
) -> tuple[tuple[LevelParity, ...], dict[str, str]]:
    """Open an engine and compare what it gives; also the machine that ran it."""
    with open_here(manifest, folder) as model:
        where = measured_on if model.simulator is None else simulated(model.simulator)
        levels = _compare(run_in_batches(model, images), expected, precision, measured_on=where)
        return levels, model.seen_on()


def _check_products(precision: Precision) -> None:
    """Refuse to compare an engine for another processor where this one's products saturate.

    Raises:
        DeviceUnavailable: they do.
    """
    if isinstance(precision, Int8) and not precision.reduce_range and this_processor().saturates:
        raise DeviceUnavailable("the products of this engine saturate on this processor, and not on its target.")


def open_here(manifest: Manifest, folder: Path) -> Runtime:
    """Open an engine on the device that it is for, or in a simulator of it, whatever machine this is.

    An export says where its numbers are from.

    Raises:
        DeviceUnavailable: there is no such device here, and no simulator.
    """
    backend, made_for = backend_of(manifest), manifest.made_for
    if made_for is not None:
        manifest = replace(manifest, made_for=replace(made_for, machine=None, instructions=()))
    simulator = backend.simulator if backend.simulator in backend.load_devices()() else None
    return backend.load_adapter()(manifest, folder, device=simulator or "auto")


def node_by_node(graph: OnnxGraph, images: ImageArray) -> dict[str, FloatArray]:
    """Evaluate a graph node by node on the CPU, as it is written."""
    session = onnx_session(graph.model, optimize=False)
    size, names = graph_batch(graph.model), [output.name for output in graph.outputs]
    parts = []
    for start in range(0, len(images), size):
        piece = images[start : start + size]
        outputs = session.run(names, {graph.input.name: piece[np.arange(size) % len(piece)]})
        parts.append([output[: len(piece)] for output in outputs])
    return dict(zip(names, (np.concatenate(column) for column in zip(*parts, strict=True)), strict=True))


def _compare(
    found: dict[str, FloatArray], expected: dict[str, FloatArray], precision: Precision, *, measured_on: str
) -> tuple[LevelParity, ...]:
    has_logits = LOGITS in found and expected[LOGITS].ndim == 2
    return compare(
        {name: expected[name] for name in found},
        found,
        min_sqnr_db=precision.min_sqnr_db,
        min_top1_agreement=precision.min_top1_agreement if has_logits else None,
        measured_on=measured_on,
        logits=LOGITS if has_logits else None,
    )
