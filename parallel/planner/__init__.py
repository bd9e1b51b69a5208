"""Predicts memory and speed of a layout (facts: no torch)."""
