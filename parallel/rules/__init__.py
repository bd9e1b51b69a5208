"""Which settings cannot run together, and what to change (no torch)."""
