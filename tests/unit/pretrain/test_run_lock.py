"""One writer for a run folder."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from launchers.run_folder.run_lock import STALE_SECONDS, RunLock
from parallel.ranks.rank_info import alone, process_environment

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
import sys, time
from pathlib import Path
from parallel.ranks.rank_info import alone
from launchers.run_folder.run_lock import RunLock
with RunLock(Path(sys.argv[1]), alone()):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True,
                              env=process_environment() | {"PYTHONPATH": str(ROOT)})
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_run_is_refused_and_the_folder_is_free_afterwards(tmp_path):
    holder = hold(tmp_path)
    try:
        with pytest.raises(UserError, match=rf"process {holder.pid} on .*last sign of life 0 s ago.*another run.dir"):
            RunLock(tmp_path, alone()).acquire()
    finally:
        holder.kill()
        holder.wait()
    with RunLock(tmp_path, alone()):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_nobody_waited_for_is_gone(tmp_path):
    holder = hold(tmp_path)
    holder.send_signal(signal.SIGKILL)
    end = time.monotonic() + 10
    while Path(f"/proc/{holder.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < end
    RunLock(tmp_path, alone()).acquire().release()
    holder.wait()


def foreign(folder, **facts):
    path = folder / "run.lock"
    path.write_text(json.dumps({"token": "t", "host": "elsewhere", "pid": 1, "attempt": 1} | facts))
    return path


def test_another_host_counts_by_its_heartbeat(tmp_path):
    path = foreign(tmp_path)
    with pytest.raises(UserError, match="process 1 on elsewhere"):
        RunLock(tmp_path, alone()).acquire()
    old = time.time() - STALE_SECONDS - 5
    os.utime(path, (old, old))
    RunLock(tmp_path, alone()).acquire().release()


def test_the_attempt_before_a_requeue_is_gone(tmp_path):
    foreign(tmp_path, job_id="12")
    again = replace(alone(), job_id="12", attempt=2)
    RunLock(tmp_path, again).acquire().release()


@pytest.mark.parametrize(("answer", "code", "taken"), [("", 0, True), ("RUNNING", 0, False), ("PENDING", 0, True)])
def test_slurm_is_asked_about_its_job(tmp_path, monkeypatch, answer, code, taken):
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\necho {answer}\nexit {code}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    folder = tmp_path / "run"
    folder.mkdir()
    path = foreign(folder, job_id="12")
    old = time.time() - STALE_SECONDS - 5
    os.utime(path, (old, old))
    lock = RunLock(folder, replace(alone(), job_id="13"))
    if taken:
        lock.acquire().release()
    else:
        with pytest.raises(UserError, match="job 12"):
            lock.acquire()


def test_a_lock_that_is_no_longer_ours_stays(tmp_path):
    lock = RunLock(tmp_path, alone()).acquire()
    (tmp_path / "run.lock").unlink()
    path = foreign(tmp_path)
    lock.release()
    assert json.loads(path.read_text())["token"] == "t"
