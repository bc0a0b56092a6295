"""Tests of deploykit.runtimes."""
