"""ExecuTorch: .pte files, on CPUs of phones, boards and servers, through XNNPACK."""
