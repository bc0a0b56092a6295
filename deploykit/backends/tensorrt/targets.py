"""What TensorRT plans can be built for: compute capabilities, and devices by name."""

from __future__ import annotations

DEVICES: dict[str, str] = {
    "jetson-xavier": "sm72",
    "t4": "sm75",
    "rtx-2080": "sm75",
    "a100": "sm80",
    "a10": "sm86",
    "rtx-3090": "sm86",
    "jetson-orin": "sm87",
    "l4": "sm89",
    "rtx-4090": "sm89",
    "h100": "sm90",
    "b200": "sm100",
    "jetson-thor": "sm110",
    "rtx-5090": "sm120",
    "dgx-spark": "sm121",
}
"""The CUDA compute capability of devices by name, from NVIDIA's table (developer.nvidia.com/cuda-gpus)."""

TARGETS: tuple[str, ...] = (*sorted(set(DEVICES.values()), key=lambda name: int(name[2:])), *DEVICES)
