"""Checks of collectives and of replicated weights."""
