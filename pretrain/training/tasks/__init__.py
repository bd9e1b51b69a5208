"""Kinds of training: what one step does with the engines of a run."""
