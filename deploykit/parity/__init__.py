"""Comparing an engine with torch, level by level."""
