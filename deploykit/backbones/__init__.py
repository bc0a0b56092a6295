"""Backbone families, their registry and their weights."""
