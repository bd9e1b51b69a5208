"""Reading from a file system that fails for a moment, as those on a network do: the read is tried again, and told."""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

TRANSIENT = (errno.EIO, errno.ESTALE, errno.EINTR, errno.ETIMEDOUT, errno.EAGAIN)
WAITS = (0.1, 0.5, 2.0, 5.0)  # seconds before each further attempt

Found = TypeVar("Found")


def with_retries(what: str, read: Callable[[], Found]) -> Found:
    """`read()`, called again after an error that may pass: at most len(WAITS) times, with a warning that says `what`.

    `read` opens its file anew where it has to: the handle of a file on NFS that is stale (ESTALE) stays so. A read that
    hangs is not ended here; a rank that waits for one is ended from outside. Raises the last OSError.
    """
    for seconds in WAITS:
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            logger.warning("%s: %s; trying again in %g s", what, error.strerror, seconds)
            time.sleep(seconds)
    return read()


def reason(error: OSError) -> str:
    """What an OSError says, and that it was tried again where it was."""
    tried = f" (tried {len(WAITS) + 1} times)" if error.errno in TRANSIENT else ""
    return f"{error.strerror or error}{tried}"
