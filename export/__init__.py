"""From a torch module to an engine file: one ONNX graph, then each runtime's form."""
