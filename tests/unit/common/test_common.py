"""Files that are whole or not there, what a refusal of the system means, errors, seeds and wording."""

import errno
import pickle
import stat

import pytest

from common.errors import (
    ConfigError,
    Damage,
    DataError,
    ExitCode,
    NodeSuspected,
    Problem,
    RendezvousError,
    StorageError,
    TrainyardError,
    UserError,
)
from common.files import LOCK_NAME, nearest_existing, refusal, write_aside, write_file, write_folder_aside, writing
from common.seeding import derive, derive_key
from common.wording import count, either, listed, nearest


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "folder" / "file"
    write_file(path, "old", mode=0o640)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode) & ~0o640) == ("old", 0)
    with pytest.raises(RuntimeError, match="half"), write_aside(path) as aside:
        aside.write_text("new, and half of")
        assert path.read_text() == "old"
        raise RuntimeError("half")
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    write_file(path, b"new")
    assert path.read_text() == "new"


def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path):
    with pytest.raises(RuntimeError, match="half"), write_folder_aside(tmp_path / "set") as aside:
        (aside / "part").touch()
        raise RuntimeError("half")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "set.tmp").mkdir()
    (tmp_path / "set.tmp" / LOCK_NAME).touch()  # left behind by a writer that was killed
    with write_folder_aside(tmp_path / "set") as aside:
        (aside / "part").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["part"]


@pytest.mark.parametrize(("number", "could", "kind"), [
    (errno.ENOSPC, True, StorageError), (errno.EIO, True, StorageError), (errno.EDQUOT, True, StorageError),
    (errno.ESTALE, True, StorageError), (errno.EROFS, True, StorageError), (errno.EROFS, False, UserError),
    (errno.EACCES, True, UserError), (errno.ENOTDIR, True, UserError), (errno.ENAMETOOLONG, True, UserError),
])
def test_whose_fault_a_refusal_is(number, could, kind):
    error = refusal(OSError(number, "x"), "/place", could)
    assert type(error) is kind
    assert str(error).startswith("cannot write /place: ")


def test_only_errors_of_the_system_are_turned(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file stands where a folder is needed"), writing(tmp_path / "file" / "x"):
        (tmp_path / "file" / "x").mkdir(parents=True)
    with pytest.raises(DataError), writing(tmp_path):
        raise DataError("damaged")
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path


@pytest.mark.parametrize(("error", "code"), [
    (UserError("x"), ExitCode.USER), (DataError("x"), ExitCode.DATA), (TrainyardError("x"), ExitCode.INTERNAL),
    (TrainyardError("x", 65), ExitCode.DATA), (NodeSuspected("x", rank=3, node="n"), ExitCode.NODE),
    (RendezvousError("x", is_mistake=True), ExitCode.USER), (RendezvousError("x", node="n"), ExitCode.NODE),
    (RendezvousError("x"), ExitCode.INTERNAL), (ConfigError([Problem(*"abcd")]), ExitCode.USER),
    (ConfigError([Damage(*"abcd")]), ExitCode.DATA), (ConfigError([Damage(*"abcd"), Problem(*"abcd")]), ExitCode.USER),
])
def test_codes_survive_the_way_from_a_worker(error, code):
    again = pickle.loads(pickle.dumps(error))
    assert (error.exit_code, again.exit_code, again.message, vars(again)) == (code, code, error.message, vars(error))


def test_a_damage_stays_one_when_its_place_is_added():
    assert isinstance(Damage(*"abcd")._replace(where="line 3"), Damage)


def test_seeds_are_those_of_before():
    """A run must resume with the same numbers, so these never change."""
    assert derive(7, "step", 3) == 6528585445776380695
    assert derive_key(7, 3, "order") == 233626981950774007058144954779969041201


def test_words():
    assert [count(number, "rank") for number in (0, 1, 12_345)] == ["0 ranks", "1 rank", "12,345 ranks"]
    assert (either([2, 4]), listed([1, 2, 4])) == ("2 or 4", "1, 2, 4")
    assert (nearest("tensr", ["tensor", "data"]), nearest("x", ["tensor"])) == ("tensor", None)
