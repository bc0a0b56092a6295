"""Sessions of Qualcomm's NPU, or of its simulator: every node there, and none on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Mapping

from deploykit.backends.onnxruntime.package import load_onnxruntime
from deploykit.backends.onnxruntime.protocols import Session
from deploykit.backends.onnxruntime.qnn.package import load_plugin, provider_devices
from deploykit.backends.onnxruntime.session import KEEP_FLOAT_WEIGHTS, session_options

NO_CPU_NODES = ("session.disable_cpu_ep_fallback", "1")
"""Without it a node that the NPU does not take runs on the CPU, and nothing says so."""

_STDOUT = 1
_silencing = threading.Lock()


def open_session(model: bytes | str, options: Mapping[str, str], settings: Mapping[str, str]) -> Session:
    """Open a model on the NPU.

    Args:
        model: an ONNX file, by its bytes or its path.
        options: of the execution provider.
        settings: of the session, keys of onnxruntime_session_options_config_keys.h.
    """
    ort, devices = load_onnxruntime(), provider_devices()
    chosen = session_options(ort, None)
    for key, value in (KEEP_FLOAT_WEIGHTS, NO_CPU_NODES, *settings.items()):
        chosen.add_session_config_entry(key, value)
    chosen.add_provider_for_devices(devices, {"backend_path": load_plugin().get_qnn_htp_path(), **options})
    with _silent_stdout():
        return ort.InferenceSession(model, chosen)


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keep what Qualcomm's library prints when it starts out of the program's output."""
    if os.name != "posix":
        yield
        return
    with _silencing, contextlib.ExitStack() as restored:
        with contextlib.suppress(OSError):  # a service may have closed its standard output
            kept = os.dup(_STDOUT)
            restored.callback(os.close, kept)
            restored.callback(os.dup2, kept, _STDOUT)
            restored.callback(ctypes.CDLL(None).fflush, None)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            restored.callback(os.close, nowhere)
            ctypes.CDLL(None).fflush(None)
            os.dup2(nowhere, _STDOUT)
        yield
