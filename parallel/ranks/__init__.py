"""Rank information from the environment, rendezvous, agreement while running, and leaving in order."""
