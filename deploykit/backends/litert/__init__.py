"""LiteRT (once TensorFlow Lite): .tflite files, on CPUs of servers, phones and boards."""
