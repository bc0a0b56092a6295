"""Tests of deploykit; folders mirror the package."""
