"""Datasets of images with captions: reading, writing, and drawn scenes."""
