"""Seeds derived from the run's seed and a purpose, so that two purposes never share random numbers."""

import hashlib


def derive(seed: int, *purpose: object) -> int:
    """A 63-bit seed from SHA-256 of the run's seed and what it is for."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derive_key(seed: int | str, *purpose: object) -> int:
    """A 128-bit key of a counter-based generator (Philox), from SHA-256 of the seed and what it is for."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
