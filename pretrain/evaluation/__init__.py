"""Measures of a trained model: `language` for decoders, `noised` for encoders and encoder-decoders, `zero_shot` for
dual encoders."""
