"""T5, versions 1.0 and 1.1: an encoder-decoder with relative positions."""
