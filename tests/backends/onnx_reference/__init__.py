"""A small real runtime as another package would add it: onnx's own reference evaluator."""
