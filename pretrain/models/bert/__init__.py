"""BERT and RoBERTa: encoders that predict masked tokens."""
