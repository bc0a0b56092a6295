"""Comparing two bundles: what a new release changes."""
