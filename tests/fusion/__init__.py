"""Tests of the fusion passes."""
