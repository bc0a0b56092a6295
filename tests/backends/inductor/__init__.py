"""Tests of the inductor backend."""
