"""Tests of the tensorrt backend."""
