"""What is trained, and the loop that trains it."""

__version__ = "0.2.0"
