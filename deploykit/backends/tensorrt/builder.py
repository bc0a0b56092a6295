"""Builds one TensorRT plan; run as a process of its own, because a build can end the process.

``python -m deploykit.backends.tensorrt.builder REQUEST.json PARENT``, where the request is a
`BuildRequest`, and the process PARENT waits for it. TensorRT's warnings and errors go to stderr, one
a line, after their severity; progress goes to stdout as lines of ``@`` and JSON. Without a ``plan``
the graph is only parsed. Exit status: 0 the request was met, 1 it was not, `NOT_WRITTEN` a file could
not be written.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from pathlib import Path

import msgspec

from deploykit.backends.tensorrt import api
from deploykit.backends.tensorrt.build import NOT_WRITTEN, PROGRESS_MARK, BuildRequest, BuildSettings
from deploykit.backends.tensorrt.protocols import Builder, Config, Named, Network, Serialized, TrtPackage


def main(request_file: str) -> int:
    """Build what the request asks for; 0 on success."""
    request = msgspec.json.decode(Path(request_file).read_bytes(), type=BuildRequest)
    settings = request.settings
    trt = api.load_tensorrt(settings.flavour)
    logger = _logger(trt)
    builder: Builder = trt.Builder(logger)
    network = api.typed_network(trt, builder)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.model):
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            _say(f"parser: {error.desc()} (node {error.node_name()!r}, {error.node_operator()})")
        return 1
    problem = _compare_layers(trt, network, settings)
    if problem is not None:
        _say(problem)
        return 1
    if not request.plan:
        return 0
    config = builder.create_builder_config()
    config.progress_monitor = monitor = _monitor(trt)
    if not _configure(trt, builder, config, settings):
        return 1
    cache = api.use_timing_cache(config, Path(request.timing_cache)) if request.timing_cache else None
    plan = builder.build_serialized_network(network, config)
    del monitor  # TensorRT holds no reference of its own
    if plan is None:
        _say("no plan came out of the build")
        return 1
    files = {request.plan: plan} if cache is None else {request.plan: plan, request.timing_cache: cache.serialize()}
    return 0 if all(_save(Path(file), content) for file, content in files.items()) else NOT_WRITTEN


def quantize_layers(trt: TrtPackage, network: Network) -> dict[str, int]:
    """Return how many quantize and dequantize layers a parsed network has, by the type of their integers."""
    counts: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.QUANTIZE:
            counts[f"QuantizeLinear {layer.get_output(0).dtype.name}"] += 1
        elif layer.type == trt.LayerType.DEQUANTIZE:
            counts[f"DequantizeLinear {layer.get_input(0).dtype.name}"] += 1
    return dict(counts)


def _compare_layers(trt: TrtPackage, network: Network, settings: BuildSettings) -> str | None:
    found = quantize_layers(trt, network)
    if found == settings.quantize_layers:
        return None
    return f"the ONNX graph has {settings.quantize_layers} and TensorRT's network has {found}: a type was changed"


def _configure(trt: TrtPackage, builder: Builder, config: Config, settings: BuildSettings) -> bool:
    api.set_tf32(trt, config, on=settings.tf32)
    absent = api.set_gpus(
        trt,
        config,
        flavour=settings.flavour,
        capability=settings.capability,
        hardware=settings.hardware_compatibility,
    )
    if absent is None and settings.version_compatible:
        absent = api.set_version_compatible(trt, config)
    if absent is not None:
        _say(f"{settings.flavour} {trt.__version__} has no {absent}")
        return False
    if settings.profile is not None:
        profile = builder.create_optimization_profile()
        profile.set_shape(settings.input, *settings.profile)
        config.add_optimization_profile(profile)
    return True


def _logger(trt: TrtPackage) -> object:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        """Writes warnings and errors to stderr; TensorRT's own logger writes warnings to stdout."""

        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Named, message: str) -> None:
            if severity in (trt.ILogger.WARNING, trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                sys.stderr.write(f"[{severity.name.lower()}] {message}\n")
                sys.stderr.flush()

    return Logger()


def _monitor(trt: TrtPackage) -> object:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined, unused-ignore]
        """Writes each phase and step of a build to stdout."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            _report(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            _report(phase_name, step + 1, self.steps.get(phase_name, 0))
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _report(phase: str, step: int, steps: int) -> None:
    line = msgspec.json.encode({"phase": phase, "step": step, "steps": steps}).decode()
    with contextlib.suppress(OSError):  # nobody listens any more
        sys.stdout.write(f"{PROGRESS_MARK}{line}\n")
        sys.stdout.flush()


def _save(path: Path, content: Serialized) -> bool:
    """Write a file in one step: several builds may share a timing cache. False where it cannot be written."""
    staged = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_bytes(content)
        staged.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        _say(f"{path.name}: {error.strerror or error}")
        return False
    return True


def _say(message: str) -> None:
    sys.stderr.write(f"[builder] {message}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
