"""BERT and RoBERTa: encoders that predict hidden tokens."""
