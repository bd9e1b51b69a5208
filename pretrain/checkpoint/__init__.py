"""Checkpoints: global tensors by name, whatever the layout was. `store` writes and reads, `manifest` describes."""
