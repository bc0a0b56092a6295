"""Tests of the Q/DQ dialects."""
