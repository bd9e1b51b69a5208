"""Files that are whole or not there: written beside their place, flushed, then renamed. And what a refusal means."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from common.errors import StorageError, TrainyardError, UserError

LOCK_NAME = "writer.lock"
CHOOSE = "choose another place"
# The path cannot be written, whoever tries again; everything else is a failure of the storage.
_OF_THE_PATH = {
    errno.EACCES: f"permission denied; {CHOOSE}",
    errno.EPERM: f"writing there is not permitted; {CHOOSE}",
    errno.EEXIST: f"a file stands where a folder is needed; {CHOOSE}",
    errno.ENOTDIR: f"a file stands where a folder is needed; {CHOOSE}",
    errno.ENOTEMPTY: f"something is there already; {CHOOSE}",
    errno.EISDIR: f"a folder stands where a file is needed; {CHOOSE}",
    errno.ENOENT: f"No such file or directory; {CHOOSE}",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: f"its symbolic links go round in a circle; {CHOOSE}",
    errno.EINVAL: f"no such name is possible there; {CHOOSE}",
}
_OF_THE_STORAGE = {
    errno.ENOSPC: "no space left on the device; free some, or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some, or write elsewhere",
    errno.EFBIG: "the file size limit of this process is used up; raise it, or write smaller files",
    errno.EROFS: "the file system is read-only; choose a folder that you may write to",
    errno.EIO: "the device reports an input/output error; look at its health",
}


@contextmanager
def writing(target: Path | str) -> Iterator[None]:
    """Turns an OSError of the block, which writes `target`, into an error of ours.

    Raises:
        UserError: `target` is a place that cannot be written.
        StorageError: the storage fails: no space, an input/output error, or read-only since the block began.
    """
    could = os.access(nearest_existing(Path(target)), os.W_OK)
    try:
        yield
    except OSError as error:
        raise refusal(error, target, could) from None


def refusal(error: OSError, target: Path | str, could_be_written: bool = True) -> TrainyardError:
    """The error of ours for an OSError while `target` was written."""
    advice = {**_OF_THE_PATH, **_OF_THE_STORAGE}.get(error.errno or 0, error.strerror or str(error))
    is_mistake = error.errno in _OF_THE_PATH or (error.errno == errno.EROFS and not could_be_written)
    return (UserError if is_mistake else StorageError)(f"cannot write {target}: {advice}")


def nearest_existing(path: Path) -> Path:
    """`path` itself, or the nearest of its parents that is there and can be looked at."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if os.path.lexists(place)), path)


@contextmanager
def write_aside(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A new file beside `path` that becomes `path` when the block ends well, and is removed when it does not.

    It is made with the permissions `mode`, less the umask. A reader sees the old file or the new one, and never half
    of one, also after a power cut. The parent folder is made. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)  # left behind by a killed process of the same number
    os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode))
    try:
        yield aside
        flush(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_file(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """`write_aside` of the whole content; a text is written in UTF-8. Raises OSError."""
    with write_aside(path, mode) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def write_folder_aside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which must not exist (or be empty), renamed to it when the block ends well.

    It is removed when the block does not. What a killed writer left is removed first, but only when it has our lock
    file and no living writer holds that. Raises OSError, and UserError when something else is in the way.
    """
    aside = folder.with_name(folder.name + ".tmp")
    lock = aside / LOCK_NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    if lock.is_file():
        with open(lock, "rb") as left:
            _lock(left, aside)
            shutil.rmtree(aside)
    elif is_empty_folder(aside):
        aside.rmdir()
    try:
        aside.mkdir()
    except FileExistsError:
        raise UserError(f"{aside} is in the way and was not made by this tool; move it elsewhere") from None
    with open(lock, "wb") as held:
        _lock(held, aside)
        try:
            yield aside
            flush(aside)
            aside.rename(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        # Only now: a kill before the rename must leave a folder that the next run may remove.
        (folder / LOCK_NAME).unlink()
        flush(folder.parent)


def is_empty_folder(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def flush(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lock(file: BinaryIO, aside: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise UserError(f"another process is writing {aside}; wait for it, or choose another folder") from None
