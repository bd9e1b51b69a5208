"""Requests to stop that lie as files, and the limit on stopping when a rank hangs."""

import os
import signal
import time
from dataclasses import replace

from launchers.run_folder import stop_requests as stop_files
from parallel.ranks.rank_info import alone
from pretrain.training.attempt import GRACE_SECONDS, UNKNOWN_GRACE_SECONDS, Attempt
from pretrain.training.stop_signals import StopSignals, request_name
from pretrain.training.stop_watchdog import StopWatchdog


def test_a_request_concerns_its_own_attempt(tmp_path):
    stop_files.ask_to_go_on_later(tmp_path, "mine")
    assert stop_files.requested(tmp_path, "mine") == "STOP.requeue"
    assert stop_files.requested(tmp_path, "another") is None
    assert stop_files.requested(tmp_path, None) is None
    assert request_name(StopSignals(tmp_path, "mine").requested_number()) == "SIGUSR1"
    assert StopSignals(tmp_path, "another").requested_number() == 0
    stop_files.forget(tmp_path, "another")
    assert os.listdir(tmp_path) == ["STOP.requeue"]
    stop_files.forget(tmp_path, "mine")
    assert os.listdir(tmp_path) == []


def test_a_persons_stop_wins_and_stays(tmp_path):
    (tmp_path / "STOP").touch()
    stop_files.ask_to_go_on_later(tmp_path, "mine")
    assert request_name(StopSignals(tmp_path, "mine").requested_number()) == "STOP"
    stop_files.forget(tmp_path, "mine")
    assert (tmp_path / "STOP").exists()


def test_a_signal_while_the_folder_is_looked_at_is_not_lost(tmp_path, monkeypatch):
    def requested(folder, token):
        signal.raise_signal(signal.SIGTERM)
        return stop_files.requested(folder, token)

    with StopSignals(tmp_path, "mine") as signals:
        monkeypatch.setattr("pretrain.training.stop_signals.requested", requested)
        assert request_name(signals.requested_number()) == "SIGTERM"


def wait_for(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def watched(limit_seconds, asked=lambda: False):
    gave_up = []
    grace = StopWatchdog(lambda: limit_seconds, asked, gave_up.append)
    with StopSignals():
        grace.start()
        yield grace, gave_up
        grace.stop()


def test_a_rank_that_hangs_after_a_request_gives_up():
    for grace, gave_up in watched(0.2):
        time.sleep(1.5)
        assert gave_up == []  # nobody asked
        signal.raise_signal(signal.SIGUSR1)
        wait_for(lambda: gave_up == [0.2])  # noqa: B023
        assert grace is not None


def test_a_request_by_file_counts_too():
    for _, gave_up in watched(0.2, asked=lambda: True):
        wait_for(lambda: gave_up == [0.2])  # noqa: B023


def test_no_limit_before_the_ranks_have_met():
    for _, gave_up in watched(None):
        signal.raise_signal(signal.SIGUSR1)
        time.sleep(2.5)
        assert gave_up == []


def test_the_limit_follows_from_what_was_measured(tmp_path):
    attempt = Attempt(tmp_path, alone())
    assert attempt._grace_seconds() is None
    with attempt:
        attempt.begin(0, None)
        assert attempt._grace_seconds() == UNKNOWN_GRACE_SECONDS
        attempt.step_done(1)
        attempt.saved(tmp_path / "checkpoints" / "step-1", 1, 50.0)
        assert GRACE_SECONDS + 100 <= attempt._grace_seconds() < GRACE_SECONDS + 110
        attempt.done()


def test_time_for_a_save(tmp_path):
    for left_seconds, late in ((40.0, True), (70.0, False), (None, False)):
        end = None if left_seconds is None else time.time() + left_seconds
        attempt = Attempt(tmp_path, replace(alone(), end_unix_seconds=end))
        attempt.saved(tmp_path, 1, 50.0)
        assert attempt.no_time_to_save() == late
