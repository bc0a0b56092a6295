"""ONNX Runtime: see backend.py for what the runtime can do."""
