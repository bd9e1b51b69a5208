"""Datasets of images with captions."""
