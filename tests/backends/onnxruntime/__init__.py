"""Tests of the onnxruntime backend."""
