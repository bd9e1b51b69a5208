"""Datasets of tokens."""
