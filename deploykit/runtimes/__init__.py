"""One adapter a runtime, all of the same shape."""
