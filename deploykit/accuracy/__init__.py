"""Accuracy of engines on images: right classes with their intervals, paired tests, neighbours of features."""
