"""Corruption of text for denoising objectives, drawn from (seed, position)."""
