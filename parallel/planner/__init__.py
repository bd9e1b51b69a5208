"""Predicts memory and speed of a layout (imports no torch)."""
