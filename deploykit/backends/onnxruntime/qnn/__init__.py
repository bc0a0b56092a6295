"""Qualcomm's NPU in ONNX Runtime: see backend.py for what it can do, and docs/qualcomm.md."""
