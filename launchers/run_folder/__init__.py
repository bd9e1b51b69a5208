"""What a run folder says to the outside: status, lock, requests to stop."""
