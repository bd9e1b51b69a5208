"""Measures of a trained model: `language` for models of text, `zero_shot` for dual encoders."""
