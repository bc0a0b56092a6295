"""Tests of the backbones, against timm where it is installed."""
