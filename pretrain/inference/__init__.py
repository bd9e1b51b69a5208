"""A trained model on one process: generation and evaluation."""
