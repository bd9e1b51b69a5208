"""Files of a run folder for other programs: status, notes of failed ranks, lock, requests to stop."""
