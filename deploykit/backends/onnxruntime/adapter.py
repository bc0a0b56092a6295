"""ONNX Runtime: opens ``model.onnx`` with one execution provider, and only that one."""

from __future__ import annotations

from typing import cast

from deploykit.arrays import FloatArray, ImageArray
from deploykit.backends.engine_file import EngineFile
from deploykit.backends.onnxruntime.package import PACKAGE, load_onnxruntime
from deploykit.backends.onnxruntime.protocols import OnnxRuntimePackage, OrtOptions, Session
from deploykit.backends.onnxruntime.session import KEEP_FLOAT_WEIGHTS, STOP_SPINNING, session_options
from deploykit.backends.runtime import Runtime
from deploykit.errors import BundleError, DeviceUnavailable, IncompatibleEngine

PROVIDERS: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
"""The execution provider behind each device; ``auto`` is the CPU. ``cuda:1`` is the second GPU."""

PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cuda": {"use_tf32": "0"}}
"""What a provider must be told to compute in the graph's types."""

SESSION_SETTINGS = {
    KEEP_FLOAT_WEIGHTS[0]: KEEP_FLOAT_WEIGHTS[1],
    STOP_SPINNING[0]: STOP_SPINNING[1],
    "session.load_model_format": "ONNX",
}
"""What every session is told. The engine is read as ONNX, the form in which its external weights were checked, and
as no other."""
FROM_MEMORY = "add_external_initializers_from_files_in_memory"
"""What takes external weights from memory; releases before 1.24 have no such method."""

_UNREADABLE = ("InvalidProtobuf", "NoSuchFile", "NoModel")
_CPU_NODES = "fallback to CPU EP has been explicitly disabled"
_NO_GRAPH = "No graph was found in the protobuf"  # how onnxruntime reports an empty file


class OnnxRuntime(Runtime):
    """An ONNX file in ONNX Runtime.

    The session is shared by all callers: onnxruntime runs one session from several threads at once, and allocates
    new outputs for every run.
    """

    def _open(self, engine: EngineFile, device: str) -> str:
        ort = load_onnxruntime()
        name, _, ordinal = ("cpu" if device == "auto" else device.lower()).partition(":")
        if name not in self.devices() or not (ordinal.isdecimal() or not ordinal) or (ordinal and name == "cpu"):
            raise DeviceUnavailable(
                f"onnxruntime has no device {device!r} here; it has {', '.join(self.devices())} "
                f"(providers: {', '.join(ort.get_available_providers())}). Choose one of these. Fix for cuda: "
                f"pip uninstall {PACKAGE.build}, then pip install onnxruntime-gpu; two builds overwrite each other."
            )
        # For throughput each of several calls computes in its own thread, which costs no waiting for one another.
        threads = 1 if self.hint == "throughput" and name == "cpu" else self.threads
        if self.streams is not None and name == "cpu":
            threads = max(1, self._cores() // self.streams)
        session = _create_session(ort, engine, name, ordinal, threads=threads, chosen=self.open_options)
        active = session.get_providers()[0]
        if active != PROVIDERS[name]:
            raise DeviceUnavailable(_fell_back(PROVIDERS[name], active))
        check_outputs(session, self._output_names, engine)
        self._session: Session | None = session
        self._input_name = self.input_spec.name
        self._names = list(self._output_names)
        return f"{name}:{ordinal}" if ordinal else name

    def _run(self, images: ImageArray) -> list[FloatArray]:
        if self._session is None:
            raise self._unusable()
        outputs = self._session.run(self._names, {self._input_name: images})
        return cast("list[FloatArray]", outputs)  # the graph's outputs are float32

    def _close(self) -> None:
        self._session = None

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """Return the devices whose execution provider this build of onnxruntime carries."""
        available = load_onnxruntime().get_available_providers()
        return tuple(device for device, provider in PROVIDERS.items() if provider in available)


def _create_session(
    ort: OnnxRuntimePackage,
    engine: EngineFile,
    device: str,
    ordinal: str,
    *,
    threads: int | None,
    chosen: dict[str, str],
) -> Session:
    """A session on a device's provider, with onnxruntime's fallbacks to the CPU, whole or by node, switched off."""
    options = session_options(ort, threads)
    for key, value in SESSION_SETTINGS.items():
        options.add_session_config_entry(key, value)
    settings = chosen | PROVIDER_OPTIONS.get(device, {})
    if device != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if ordinal:
        settings["device_id"] = ordinal
    provider = (PROVIDERS[device], settings)
    try:
        session = ort.InferenceSession(_source(options, engine), options, providers=[provider], enable_fallback=0)
    except Exception as error:
        if _CPU_NODES in str(error):
            raise DeviceUnavailable(_fell_back(PROVIDERS[device], PROVIDERS["cpu"])) from error
        # onnxruntime's exceptions share no base class but Exception.
        if type(error).__name__ in _UNREADABLE or _NO_GRAPH in str(error):
            raise BundleError(
                f"{engine.name} is not a readable ONNX file ({error}). Export the bundle again, or copy it again."
            ) from error
        raise IncompatibleEngine(
            f"onnxruntime {ort.__version__} refuses {engine.name}: {error}. "
            "Install the onnxruntime that the manifest names, or export the bundle again here."
        ) from error
    session._model_bytes = None  # kept only to make the session anew on another provider
    return session


def _source(options: OrtOptions, engine: EngineFile) -> bytes | str:
    """Return the model's bytes, with its external weights in the options; or the path of a private copy with both."""
    weights = engine.parts()
    if not weights:
        return engine.read()
    add_weights = getattr(options, FROM_MEMORY, None)
    if add_weights is None:
        return str(engine)
    add_weights(list(weights), list(weights.values()), [len(content) for content in weights.values()])
    return engine.read()


def _fell_back(wanted: str, active: str) -> str:
    return (
        f"onnxruntime was asked for {wanted} and made a session on {active}, for all nodes or for some. "
        f"Check the driver and libraries that {wanted} needs and the operators that it has, or use device='cpu'."
    )


def check_outputs(session: Session, expected: tuple[str, ...], engine: EngineFile) -> None:
    """Refuse an engine without the outputs that its manifest names.

    Raises:
        BundleError: it lacks one.
    """
    found = [output.name for output in session.get_outputs()]
    missing = [name for name in expected if name not in found]
    if missing:
        raise BundleError(
            f"{engine.name} has the outputs {', '.join(found)}; the manifest names also {', '.join(missing)}. "
            "The engine is not the one that the manifest describes: export the bundle again."
        )
