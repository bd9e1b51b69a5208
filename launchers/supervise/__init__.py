"""One attempt under a launcher: its supervisor, a wrapper around each rank, and the outcome."""
