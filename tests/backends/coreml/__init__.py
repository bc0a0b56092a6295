"""The Core ML runtime."""
