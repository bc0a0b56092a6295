"""Qualcomm's NPU in ONNX Runtime: opens ``model.onnx``, which holds a QNN context binary for one SoC."""

from __future__ import annotations

from collections.abc import Mapping

from deploykit.backends.engine_file import EngineFile
from deploykit.backends.onnxruntime.adapter import OnnxRuntime, check_outputs
from deploykit.backends.onnxruntime.protocols import Session
from deploykit.backends.onnxruntime.qnn.context_file import check_context
from deploykit.backends.onnxruntime.qnn.package import DEVICE, PLUGIN, PROVIDER, SIMULATOR, devices, sdk_version
from deploykit.backends.onnxruntime.qnn.session import open_session
from deploykit.backends.runtime import version_key
from deploykit.errors import DeviceUnavailable, IncompatibleEngine


class QnnRuntime(OnnxRuntime):
    """A QNN context binary on the NPU that it was built for, or in its simulator where that is asked for.

    The simulator computes as the NPU does, as far as Qualcomm's libraries know, and says nothing of its speed.
    """

    def _open(self, engine: EngineFile, device: str) -> str:
        name, here = DEVICE if device == "auto" else device.lower(), self.devices()
        if name not in here:
            raise DeviceUnavailable(self._absent(device, here))
        check_context(engine.read(), engine.name)
        self._check_sdk(self.manifest.requires)
        session = self._session_of(engine)
        active = session.get_providers()[0]
        if active != PROVIDER:
            raise DeviceUnavailable(f"onnxruntime was asked for {PROVIDER} and made a session on {active}.")
        check_outputs(session, self._output_names, engine)
        self._session = session
        self._input_name = self.input_spec.name
        self._names = list(self._output_names)
        if name == SIMULATOR:
            self.simulator = f"the simulator of QNN {sdk_version()}"
        return name

    def seen_on(self) -> dict[str, str]:
        """Return the machine, the device or its simulator, and the versions that run this engine."""
        return super().seen_on() | {PLUGIN.module: self.backend.own_version() or "unknown"}

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """Return ``qnn`` where there is an NPU, ``qnn-simulator`` on x86-64, and else nothing."""
        return devices()

    def _session_of(self, engine: EngineFile) -> Session:
        try:
            return open_session(engine.read(), {}, {})
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise IncompatibleEngine(
                f"{PLUGIN.distribution} with QNN {sdk_version()} refuses {engine.name}: {error}. It was built for "
                f"{self._soc()}: open it on that SoC, or export the backbone for this one."
            ) from error

    def _absent(self, device: str, here: tuple[str, ...]) -> str:
        simulator = f" Without the device, device={SIMULATOR!r} gives its numbers." if SIMULATOR in here else ""
        return (
            f"this engine is for {self._soc()}, and {device!r} was asked for; this machine has "
            f"{', '.join(here) or 'no such device'}. Copy the bundle to the device and open it there.{simulator}"
        )

    def _soc(self) -> str:
        target, tied = self.manifest.made_for, self.manifest.requires
        title = "a Qualcomm SoC" if target is None else target.title
        return f"{title} (soc_model {tied.get('soc_model', 'unknown')}, htp_arch {tied.get('htp_arch', 'unknown')})"

    def _check_sdk(self, tied: Mapping[str, str]) -> None:
        """Refuse a context binary that a newer SDK wrote.

        Raises:
            IncompatibleEngine: it did.
        """
        built, here = tied.get("qnn_sdk", ""), sdk_version()
        if version_key(here) < version_key(built):
            wrote = self.manifest.tools.get(PLUGIN.module)
            raise IncompatibleEngine(
                f"this engine was built with QNN {built}, and {PLUGIN.distribution} here has QNN {here}, which reads "
                f"none of newer ones. Install '{PLUGIN.distribution}{f'>={wrote}' if wrote else ''}'."
            )
