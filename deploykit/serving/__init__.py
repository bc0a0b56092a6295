"""Bundles laid out as model servers read them: Triton, OpenVINO Model Server, and MLServer, which KServe runs."""
