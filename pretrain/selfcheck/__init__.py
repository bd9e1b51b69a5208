"""Whether the ranks of a launcher could train together."""
