"""Tests of deploykit.backends."""
