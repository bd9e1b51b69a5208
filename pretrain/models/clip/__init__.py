"""CLIP dual encoders: an image tower and a text tower that meet in one loss."""
