"""Dataset folders: manifest, tar shards, and reading and writing them."""
