"""The ExecuTorch runtime."""
