"""One start of an engine, in the process that runs this file and nothing else: deploykit's, or the raw runtime's.

    python _start.py ours|raw onnxruntime|openvino BUNDLE

Prints milliseconds and megabytes as one line of JSON. Nothing is imported before the clock runs but what it needs.
"""

import json
import sys
import time

_BEGUN = time.perf_counter()


def _since(start: float) -> float:
    return 1000 * (time.perf_counter() - start)


def _resident_mb() -> float:
    with open("/proc/self/status", encoding="utf-8") as status:  # noqa: PTH123  (pathlib would be part of the import)
        fields = dict(line.split(":", 1) for line in status if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024 / 1e6


def start_ours(folder: str) -> tuple[float, float, float]:
    """Open a bundle and call it once; milliseconds of the import, the opening and the first call."""
    import numpy as np

    image = np.zeros((1, 3, 224, 224), np.float32)
    start = time.perf_counter()
    import deploykit

    load_bundle = deploykit.load_bundle  # names are resolved when they are first used
    imported = _since(start)
    start = time.perf_counter()
    model = load_bundle(folder)
    opened = _since(start)
    start = time.perf_counter()
    model(image)
    return imported, opened, _since(start)


def start_onnxruntime(folder: str) -> tuple[float, float, float]:
    """Do the same with ONNX Runtime alone; its import is part of the opening, as it is of a bundle's."""
    import numpy as np

    image = np.zeros((1, 3, 224, 224), np.float32)
    start = time.perf_counter()
    import onnxruntime

    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    opened = _since(start)
    start = time.perf_counter()
    session.run(None, {"images": image})
    return 0.0, opened, _since(start)


def start_openvino(folder: str) -> tuple[float, float, float]:
    """Do the same with OpenVINO alone."""
    import numpy as np

    image = np.zeros((1, 3, 224, 224), np.float32)
    start = time.perf_counter()
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(f"{folder}/model.xml", "CPU", settings).create_infer_request()
    opened = _since(start)
    start = time.perf_counter()
    request.infer([image], share_inputs=True)
    return 0.0, opened, _since(start)


if __name__ == "__main__":
    way, runtime, bundle = sys.argv[1:]
    raw = {"onnxruntime": start_onnxruntime, "openvino": start_openvino}
    imported_ms, open_ms, first_ms = start_ours(bundle) if way == "ours" else raw[runtime](bundle)
    found = {"import_ms": imported_ms, "open_ms": open_ms, "first_ms": first_ms, "memory_mb": _resident_mb()}
    print(json.dumps({**found, "all_ms": _since(_BEGUN)}))
