"""Ranks on this machine, as tiny children that do not import torch: codes, messages, signals, no orphans."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from launchers.local.ranks_here import Limits, run_ranks

QUICK = Limits(agree_seconds=0.5, stop_seconds=1.0)
PRELUDE = "import os, signal, sys, time\nrank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])\n"


def child(body):
    return [sys.executable, "-c", PRELUDE + textwrap.dedent(body)]


def gone(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def wait_for(condition, seconds=45):  # a child that nobody ends would end by itself after 60
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def pids(folder, number):
    def read():
        return [int(path.read_text()) for path in folder.glob("pid*") if path.read_text()]
    wait_for(lambda: len(read()) == number)
    return read()


def test_all_ranks_run_with_their_variables(tmp_path):
    code = run_ranks(child(f"""
        names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME"]
        open({str(tmp_path)!r} + f"/seen{{rank}}", "w").write(" ".join(os.environ[name] for name in names))
    """), 3, tmp_path / "logs")
    assert code == 0
    loopback = "lo" if sys.platform == "linux" else "lo0"
    assert [(tmp_path / f"seen{rank}").read_text() for rank in range(3)] == [
        f"{rank} {rank} 3 3 127.0.0.1 {loopback}" for rank in range(3)]


def test_rank_zero_gets_the_listening_socket_and_nobody_else(tmp_path):
    code = run_ranks(child("""
        import socket
        port = int(os.environ["MASTER_PORT"])
        if rank == 0:
            listener = socket.socket(fileno=int(os.environ["TRAINYARD_STORE_FD"]))
            assert listener.getsockname() == ("127.0.0.1", port)
            listener.accept()
        else:
            assert "TRAINYARD_STORE_FD" not in os.environ
            socket.create_connection(("127.0.0.1", port), timeout=10)
    """), 2, tmp_path)
    assert code == 0


def test_cores_are_shared_unless_the_user_said_otherwise(tmp_path, monkeypatch):
    body = f"open({str(tmp_path)!r} + '/threads', 'w').write(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_ranks(child(body), 1000 // 500, tmp_path) == 0
    assert (tmp_path / "threads").read_text() == str(max(1, len(os.sched_getaffinity(0)) // 2))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run_ranks(child(body), 2, tmp_path) == 0
    assert (tmp_path / "threads").read_text() == "7"


@pytest.mark.parametrize("code", [1, 65, 70, 77])
def test_the_first_failing_rank_decides_and_is_quoted(tmp_path, capfd, code):
    started = time.monotonic()
    result = run_ranks(child(f"""
        if rank == 1:
            try:
                raise ValueError("the disk is full of bees")
            except ValueError:
                import traceback; traceback.print_exc()
            sys.exit({code})
        time.sleep(60)
    """), 3, tmp_path, QUICK)
    assert result == code
    said = capfd.readouterr().err
    assert f"rank 1 failed with exit code {code}; its log is {tmp_path / 'rank-1.log'}" in said
    assert said.count("ValueError: the disk is full of bees") == 1
    assert "Traceback" in said
    assert f"the other 2 ranks were ended; their logs are in {tmp_path}" in said
    assert time.monotonic() - started < 15


def test_a_rank_that_ignores_the_polite_end_is_killed(tmp_path):
    assert run_ranks(child("""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank == 1:
            time.sleep(0.3); sys.exit(77)
        time.sleep(60)
    """), 2, tmp_path, QUICK) == 77


def test_a_rank_ended_by_a_signal(tmp_path, capfd):
    assert run_ranks(child("""
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    """), 2, tmp_path, QUICK) == 137
    assert "rank 1 was ended by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize("failing", ["True", "rank == 1", "rank == 0"])
def test_a_mistake_of_the_user_is_said_once(tmp_path, capfd, failing):
    assert run_ranks(child(f"""
        if {failing}:
            sys.stderr.write("config: 1 problem: heads does not divide\\n")
            sys.exit(2)
        time.sleep(60)
    """), 2, tmp_path, QUICK) == 2
    captured = capfd.readouterr()
    assert (captured.out + captured.err).count("heads does not divide") == 1
    assert "Traceback" not in captured.out + captured.err
    assert "rank 1" not in captured.err


def test_only_this_attempt_is_quoted(tmp_path, capfd):
    (tmp_path / "rank-1.log").write_text("an older failure\n")
    assert run_ranks(child("sys.exit(70 if rank == 1 else 0)"), 2, tmp_path, QUICK) == 70
    assert "an older failure" not in capfd.readouterr().err


def test_logs_are_kept_only_after_a_failure(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_ranks(child("print('hello')"), 2, None, QUICK) == 0
    assert not list(tmp_path.iterdir())
    assert run_ranks(child("print('hello'); sys.exit(70)"), 2, None, QUICK) == 70
    assert (next(tmp_path.iterdir()) / "rank-1.log").read_text() == "hello\n"


PARENT = """
import sys
from pathlib import Path
from launchers.local.ranks_here import Limits, run_ranks
sys.exit(run_ranks([sys.executable, "-c", sys.argv[1]], int(sys.argv[2]), Path(sys.argv[3]), Limits(0.5, 1.0)))
"""
WAITING = PRELUDE + """
got = []
def handle(number, frame):
    got.append(number)
    open(f"{folder}/got{rank}", "a").write(f"{number} ")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, handle)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR1])
open(f"{folder}/pid{rank}", "w").write(str(os.getpid()))
end = time.monotonic() + 60
while time.monotonic() < end and not (got and leaves):
    time.sleep(0.02)
time.sleep(0.3)
sys.exit(75)
"""


def start_parent(tmp_path, leaves=True, body=WAITING):
    code = f"folder, leaves = {str(tmp_path)!r}, {leaves}\n" + body
    root = Path(__file__).resolve().parents[3]
    return subprocess.Popen([sys.executable, "-c", PARENT, code, "2", str(tmp_path / "logs")], cwd=root,
                            env=os.environ | {"PYTHONPATH": str(root)}, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_once(tmp_path, number):
    parent = start_parent(tmp_path)
    pids(tmp_path, 2)
    os.killpg(parent.pid, number)  # as a terminal or a scheduler does: the whole group
    assert parent.wait(timeout=300) == 75
    assert [(tmp_path / f"got{rank}").read_text() for rank in range(2)] == [f"{int(number)} "] * 2
    assert "failed" not in parent.stderr.read()


def test_a_signal_during_start_up_is_kept_for_the_rank(tmp_path):
    late = WAITING.replace("got = []", "got = []\nopen(f'{folder}/early{rank}', 'w').close()\ntime.sleep(1)", 1)
    parent = start_parent(tmp_path, body=late)
    wait_for(lambda: len(list(tmp_path.glob("early*"))) == 2)
    parent.send_signal(signal.SIGUSR1)
    assert parent.wait(timeout=300) == 75
    assert len(list(tmp_path.glob("got*"))) == 2


def test_a_second_interrupt_ends_everything_at_once(tmp_path):
    parent = start_parent(tmp_path, leaves=False)
    ranks = pids(tmp_path, 2)
    parent.send_signal(signal.SIGINT)
    wait_for(lambda: len(list(tmp_path.glob("got*"))) == 2)
    assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    assert parent.wait(timeout=300) == 130
    assert all(gone(pid) for pid in ranks)


def test_no_rank_outlives_a_killed_parent(tmp_path):
    parent = start_parent(tmp_path, leaves=False)
    ranks = pids(tmp_path, 2)
    parent.kill()
    parent.wait()
    wait_for(lambda: all(gone(pid) for pid in ranks))


def test_workers_of_a_failed_rank_are_ended_too(tmp_path):
    assert run_ranks(child(f"""
        if rank == 1:
            if os.fork() == 0:
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
                open({str(tmp_path)!r} + "/pid_worker", "w").write(str(os.getpid()))
                time.sleep(60)
            time.sleep(0.5)
            os._exit(70)
        time.sleep(60)
    """), 2, tmp_path / "logs", QUICK) == 70
    worker, = pids(tmp_path, 1)
    wait_for(lambda: gone(worker))


def test_no_ranks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        run_ranks(["true"], 0, tmp_path)
