"""The config of a run: sections, checks, the YAML file (no torch)."""
