"""Ranks of this machine: started, watched, ended together."""
