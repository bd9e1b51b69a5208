"""Ground for every room: errors, files, seeds, wording. Imports the standard library only."""
