"""Ground for every room: errors, files, seeds, wording. Imports nothing of the project and no torch."""
