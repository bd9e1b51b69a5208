"""BART: an encoder-decoder that restores damaged text."""
