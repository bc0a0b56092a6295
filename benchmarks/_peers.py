"""Every way that users have to run a backbone, as calls: deploykit's engines and those of the peers."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from _engines import Engines, published
from _stock import STOCK, by_nncf
from _timing import RUNTIMES, Call
from torch import nn
from torch_compile import RIVALS, compiled

from deploykit.arrays import FloatArray
from deploykit.optional import installed_version

OURS = "deploykit"
EAGER, COMPILED = "torch eager", "torch.compile"
EXPORTED = "torch.onnx.export"
HALVED, COMPRESSED = "float16 converter", "save_model, FP16"
ON_OPENVINO, MODELOPT = "NNCF on OpenVINO", "ModelOpt"
TORCH = "torch"

NEEDED = {
    "NNCF on ONNX": ("nncf", "nncf"),
    ON_OPENVINO: ("nncf", "nncf"),
    MODELOPT: ("modelopt", "nvidia-modelopt"),
}
"""The module that a route needs, and its distribution."""
LEFT_OUT = {
    "optimum-intel": (
        "not installed: 2.2.0 needs huggingface_hub<2 and typer<0.26, older than the tested ones; "
        "it quantizes by NNCF, which has rows of its own"
    ),
    "optimum-onnx": (
        "not installed: 0.1.0 needs transformers<4.58 and huggingface_hub<1, older than the tested one; "
        "it quantizes by quantize_static and quantize_dynamic, which have rows of their own"
    ),
    "ModelOpt on ONNX": (
        "not installed: nvidia-modelopt[onnx] 0.47.0 needs onnx 1.21, older than the tested one, and onnxruntime-gpu; "
        "its torch route has rows"
    ),
}
"""Peers without a row, and why."""

Opener = Callable[[], Call]


def torch_routes(engines: Engines, *, compile_too: bool) -> dict[str, Opener]:
    """The backbone in torch, as it is and compiled with frozen weights."""
    backbone = engines.network.backbone
    routes: dict[str, Opener] = {EAGER: lambda: partial(_eager, backbone)}
    if compile_too:
        image = engines.network.calibrated[:1]
        routes[COMPILED] = lambda: compiled(copy.deepcopy(backbone), RIVALS["freezing"], image)
    return routes


def _eager(module: nn.Module, images: FloatArray) -> list[FloatArray]:
    with torch.inference_mode():
        return [module(torch.from_numpy(images)).numpy()]


def engine_routes(engines: Engines, runtime: str, precision: str) -> dict[str, Opener]:
    """Deploykit's engine and every peer's into one runtime at one precision; nothing is built before it is opened."""
    return {
        name: partial(_opened, RUNTIMES[runtime], make) for name, make in makers(engines, runtime, precision).items()
    }


def makers(engines: Engines, runtime: str, precision: str) -> dict[str, Callable[[], Path]]:
    """What makes each route's file where it is not there."""
    return {OURS: partial(engines.engine, runtime, precision), **_files(engines, runtime, precision)}


def _opened(open_graph: Callable[[Path], Call], make: Callable[[], Path]) -> Call:
    return open_graph(make())


def _files(engines: Engines, runtime: str, precision: str) -> dict[str, Callable[[], Path]]:
    """The peers' files, made where they are not there."""
    if precision == "fp32":
        return {EXPORTED: engines.plain}
    if precision == "fp16":
        route, make = (COMPRESSED, _compressed) if runtime == "openvino" else (HALVED, _halved)
        return {route: partial(make, engines)}
    made: dict[str, Callable[[], Path]] = {name: partial(_stock, engines, name) for name in STOCK}
    made[MODELOPT] = partial(_modelopt, engines)
    if runtime == "openvino":
        made[ON_OPENVINO] = partial(_nncf_on_openvino, engines)
    return {name: make for name, make in made.items() if is_installed(name)}


def is_installed(route: str) -> bool:
    """Return whether the package that a route needs is here."""
    return route not in NEEDED or installed_version(NEEDED[route][0]) is not None


def _kept(engines: Engines, name: str, write: Callable[[Path], object]) -> Path:
    """Return a peer's file in the folder of the engines, made where it is not there."""
    target = engines.folder / name
    if not target.exists():
        published(write, target)
    return target


def _stock(engines: Engines, name: str) -> Path:
    images = engines.network.calibrated
    file = f"{name.replace(' ', '-')}.onnx"
    return _kept(engines, file, lambda path: onnx.save(STOCK[name](onnx.load(engines.plain()), images), path))


def _halved(engines: Engines) -> Path:
    """ONNX Runtime's own converter of a graph to FP16, inputs and outputs kept as they are."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    def write(path: Path) -> None:
        onnx.save(convert_float_to_float16(onnx.load(engines.plain()), keep_io_types=True), path)

    return _kept(engines, "float16.onnx", write)


def _compressed(engines: Engines) -> Path:
    """OpenVINO's own FP16: weights are halved in the file, and computed with at FP32."""
    import openvino

    def write(folder: Path) -> None:
        folder.mkdir()
        openvino.save_model(
            openvino.Core().read_model(str(engines.plain())), folder / "model.xml", compress_to_fp16=True
        )

    return _kept(engines, "openvino-compressed", write) / "model.xml"


def _nncf_on_openvino(engines: Engines) -> Path:
    import openvino

    def write(folder: Path) -> None:
        folder.mkdir()
        plain = onnx.load(engines.plain())
        quantized = by_nncf(openvino.Core().read_model(str(engines.plain())), plain, engines.network.calibrated)
        openvino.save_model(quantized, folder / "model.xml", compress_to_fp16=False)

    return _kept(engines, "nncf-openvino", write) / "model.xml"


def _modelopt(engines: Engines) -> Path:
    """ModelOpt's INT8 of timm's model in torch, exported with its Q/DQ nodes."""

    def write(path: Path) -> None:
        model = engines.timm()  # first: timm is imported so that torchvision, which both import, finds its operators
        import modelopt.torch.quantization as mtq

        images = torch.from_numpy(engines.network.calibrated)

        def calibrate(network: nn.Module) -> None:
            with torch.no_grad():
                for image in images:
                    network(image[None])

        with contextlib.redirect_stdout(io.StringIO()):
            quantized = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, calibrate)
            names = {"input_names": ["images"], "output_names": ["logits"]}
            with torch.no_grad():
                torch.onnx.export(quantized, (images[:1],), path, dynamo=False, opset_version=17, **names)

    return _kept(engines, "modelopt.onnx", write)


def opened(
    routes: dict[str, Opener], image: FloatArray, announce: Callable[[str], None]
) -> Iterator[tuple[str, Call | str]]:
    """Open route after route, announced by name; yield each as a call that ran once, or as why it is none."""
    for name, opener in routes.items():
        announce(name)
        try:
            call = opener()
            if not all(np.isfinite(output).all() for output in call(image)):
                yield name, "its outputs are not finite"
                continue
        except Exception as error:  # a peer that fails is a finding
            if name == OURS:
                raise
            yield name, f"{type(error).__name__}: {' '.join(str(error).split())[:110]}"
        else:
            yield name, call
