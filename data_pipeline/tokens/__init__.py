"""Datasets of tokenized documents: folders, and documents in memory."""
