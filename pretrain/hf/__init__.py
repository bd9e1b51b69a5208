"""Folders of the transformers library: reading, writing, and the measured certificate."""
