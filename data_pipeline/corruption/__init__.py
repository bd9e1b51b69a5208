"""Stages that corrupt a window of tokens for an objective to restore, drawn from (seed, position)."""
