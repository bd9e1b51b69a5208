"""status.json, notes of failed ranks, progress and suspect nodes."""

import json
import signal
from dataclasses import replace
from pathlib import Path

from common.errors import StorageError
from launchers.run_folder import notes, status
from launchers.run_folder.json_file import write_json
from parallel.ranks.rank_info import alone
from pretrain.training.stop_signals import StopSignals, request_name

INFO = replace(alone(), node="n1", nodes=("n1", "n2"), job_id="7")


def test_attempts_follow_each_other(tmp_path):
    first = status.begin(tmp_path, INFO, 0, None)
    assert (first.attempt, first.exit_code, first.nodes) == (1, None, ("n1", "n2"))
    status.write(tmp_path, replace(first, reason="SIGUSR1", exit_code=75, last_step=12, checkpoint_step=12))
    second = status.begin(tmp_path, INFO, 12, Path("checkpoints/step-12"))
    assert (second.attempt, second.first_step, second.last_checkpoint) == (2, 12, "step-12")
    assert [entry["exit_code"] for entry in second.history] == [75]
    assert status.read(tmp_path).attempt == 2
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_an_attempt_that_was_killed_is_remembered_as_such(tmp_path):
    status.begin(tmp_path, INFO, 0, None)
    assert "without a reason" in status.begin(tmp_path, INFO, 0, None).history[0]["reason"]


def test_the_first_failure_counts_not_the_ranks_that_lost_it(tmp_path):
    status.begin(tmp_path, INFO, 0, None)
    notes.note_failure(tmp_path, replace(INFO, rank=3, node="n2"), 5, 77, reason="ValueError: bees")
    notes.note_failure(tmp_path, replace(INFO, rank=0), 5, 70, reason="Connection closed by peer")
    seen = status.read(tmp_path)
    assert (seen.exit_code, seen.rank, seen.node, seen.reason, seen.last_step) == (77, 3, "n2", "ValueError: bees", 5)
    assert status.begin(tmp_path, INFO, 0, None).history[0]["rank"] == 3
    assert status.read(tmp_path).exit_code is None


def note(folder, kind, rank, seconds, code, reason):
    write_json(folder / "logs" / f"{kind}-rank{rank}.json", {
        "rank": rank, "node": f"n{rank}", "exit_code": code, "reason": reason, "unix_seconds": seconds})


LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:18423"


def test_a_rank_killed_is_found_behind_those_who_lost_it(tmp_path):
    note(tmp_path, "failed", 0, 100.0, 70, LOST)
    note(tmp_path, "exit", 0, 100.5, 70, "exit code 70")
    note(tmp_path, "exit", 2, 100.1, 137, "ended by SIGKILL")
    note(tmp_path, "exit", 1, 100.2, 143, "ended by SIGTERM")
    assert notes.first_failure(tmp_path).rank == 2


def test_nobody_is_blamed_for_a_node_that_left_no_word(tmp_path):
    note(tmp_path, "failed", 0, 100.0, 70, LOST)
    note(tmp_path, "exit", 0, 100.5, 70, "exit code 70")
    note(tmp_path, "exit", 1, 130.0, 137, "ended by SIGKILL")  # the launcher, tidying up
    found = notes.first_failure(tmp_path)
    assert (found.rank, found.node, found.exit_code) == (None, None, 70)
    assert "ranks 0: lost the connection" in found.reason


def test_damaged_files_are_no_status(tmp_path):
    assert status.read(tmp_path) is None
    for text in ("", "[1]", "{", "x" * (2 << 20)):
        (tmp_path / "status.json").write_text(text)
        assert status.read(tmp_path) is None
    (tmp_path / "status.json").write_text(json.dumps({"attempt": 3, "of a newer version": 1}))
    assert status.read(tmp_path).attempt == 3


def test_progress(tmp_path):
    last = status.begin(tmp_path, INFO, 0, None)
    for expected in (1, 2, 3):
        last = status.write(tmp_path, replace(last, exit_code=70, reason="x"))
        assert status.attempts_without_progress(last) == expected
        last = status.begin(tmp_path, INFO, 0, None)
    last = status.write(tmp_path, replace(last, exit_code=70, checkpoint_step=9))
    assert status.attempts_without_progress(last) == 0


def test_suspect_nodes(tmp_path):
    bad = status.Status(exit_code=71, node="n9", history=(
        {"exit_code": 70, "node": "n1"}, {"exit_code": 137, "node": "n2"}, {"exit_code": 70, "node": "n1"},
        {"exit_code": 75, "node": "n4"}, {"exit_code": 2, "node": "n3"}, {"exit_code": 2, "node": "n3"},
        {"exit_code": 74, "node": "n5"}, {"exit_code": 74, "node": "n5"},
        *(2 * ({"exit_code": 70, "node": "n6", "reason": "UserError: nan"},)),
        *(2 * ({"exit_code": 70, "node": "n7", "reason": "NotFinite: the gradient norm is nan"},))))
    assert status.suspect_nodes(bad) == ["n1", "n9"]


def test_reasons():
    assert status.reason_of(StorageError("storage\nis full")) == ("StorageError: storage is full", 74)
    assert status.reason_of(ValueError("x")) == ("ValueError: x", 70)
    assert status.reason_of(SystemExit(77))[1] == 77


def test_signals_only_set_a_flag():
    with StopSignals() as signals:
        assert not signals.requested
        signal.raise_signal(signal.SIGUSR1)
        assert request_name(signals.requested_number()) == "SIGUSR1"
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert request_name(signals.requested_number()) == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
