"""The keeper of a rank, the supervisor of a launcher, and what follows an attempt: tiny children without torch."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launchers.run_folder.notes import first_failure, note_failure
from launchers.run_folder.status import Status, begin, read, write
from launchers.supervise.outcome import Outcome, close, decide
from parallel.ranks.rank_info import alone, process_environment

ROOT = Path(__file__).resolve().parents[3]


def supervise(folder, body, wait=True):
    (folder / "logs").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "launchers.supervise.supervisor", str(folder), "--", sys.executable, "-c",
               textwrap.dedent(body)]
    process = subprocess.Popen(command, env=process_environment() | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
                               text=True, cwd=folder)
    if not wait:
        return process
    _, said = process.communicate(timeout=300)
    return process.returncode, said


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_ranks_own_code_wins_over_the_launchers(tmp_path):
    note = {"rank": 3, "node": "n2", "exit_code": 77, "reason": "exit code 77"}
    code, said = supervise(tmp_path, f"""
        import json, sys, time
        open("logs/rank-3.log", "w").write("Traceback (most recent call last):\\nValueError: bees\\n")
        json.dump({note} | {{"unix_seconds": time.time()}}, open("logs/exit-rank3.json", "w"))
        sys.exit(143)
    """)
    assert code == 77
    assert "rank 3 on n2 failed with exit code 77" in said
    assert "ValueError: bees" in said
    status = read(tmp_path)
    assert (status.exit_code, status.rank, status.node) == (77, 3, "n2")


def test_a_launcher_that_says_nothing_went_wrong_is_not_believed(tmp_path):
    assert supervise(tmp_path, "raise SystemExit(0)")[0] == 70


def test_the_status_of_this_attempt_counts(tmp_path):
    write(tmp_path, Status(exit_code=0, reason="done"))
    assert supervise(tmp_path, "raise SystemExit(9)")[0] == 9  # that one was of an earlier attempt
    assert read(tmp_path).attempt == 2
    code, _ = supervise(tmp_path, """
        import json, sys, time
        json.dump({"exit_code": 0, "reason": "done", "started_unix_seconds": time.time(),
                   "updated_unix_seconds": time.time()}, open("status.json", "w"))
        sys.exit(1)
    """)
    assert code == 0


@pytest.mark.skipif(sys.platform != "linux", reason="adoption of orphans is Linux's")
def test_ranks_that_a_dead_launcher_left_behind_are_ended(tmp_path):
    code, _ = supervise(tmp_path, """
        import os, subprocess, sys
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
        open("pid", "w").write(str(sleeper.pid))
        os._exit(0)
    """)
    assert code == 70
    assert gone(int((tmp_path / "pid").read_text()))


def test_signals_become_a_request_in_the_run_folder(tmp_path):
    process = supervise(tmp_path, """
        import json, os, time
        open("up", "w").close()
        while not os.path.exists("STOP.requeue"): time.sleep(0.02)
        json.dump({"exit_code": 75, "reason": "SIGUSR1", "started_unix_seconds": time.time(),
                   "updated_unix_seconds": time.time()}, open("status.json", "w"))
        raise SystemExit(1)
    """, wait=False)
    wait_for((tmp_path / "up").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 75
    process.stderr.close()


def start_under_slurm(folder, srun, *words):
    """A supervisor with an srun of this body, and a scontrol that writes down what it is asked for."""
    for name, body in {"srun": srun, "scontrol": f"echo $1 >>{folder}/did", "squeue": "exit 0"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "logs").mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "launchers.supervise.supervisor", "--slurm", "--requeue", *words],
        stderr=subprocess.PIPE, text=True,
        env=process_environment() | {"PYTHONPATH": str(ROOT), "PATH": f"{folder}:{os.environ['PATH']}"})


def test_a_warning_before_the_launcher_starts_is_kept(tmp_path):
    """While nodes are checked, no rank is there to be asked: nothing is started, and the job is requeued."""
    process = start_under_slurm(tmp_path, f"touch {tmp_path}/up; sleep 2", "--check-nodes=1", str(tmp_path), "--",
                                "touch", str(tmp_path / "started"))
    wait_for((tmp_path / "up").exists)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert "requeue: SIGUSR1" in said
    assert (tmp_path / "did").read_text() == "requeue\n"
    assert not (tmp_path / "started").exists()
    assert (read(tmp_path).exit_code, read(tmp_path).reason) == (75, "SIGUSR1")


@pytest.mark.slow
@pytest.mark.parametrize("cancelled", [True, False])
def test_a_cancelled_job_does_not_come_back_however_its_ranks_ended(tmp_path, cancelled):
    process = start_under_slurm(tmp_path, f"touch {tmp_path}/up; sleep 2; exit 137", str(tmp_path), "--", "srun")
    wait_for((tmp_path / "up").exists)
    if cancelled:
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 137
    process.stderr.close()
    assert (tmp_path / "did").exists() != cancelled


@pytest.mark.slow
def test_a_launcher_that_starts_ranks_again_is_left_to_it(tmp_path):
    (tmp_path / "logs").mkdir()
    body = f"""
import json, os, time
from pathlib import Path
folder = Path({str(tmp_path)!r})
note = folder / "logs" / "exit-rank1.json"
note.write_text(json.dumps({{"rank": 1, "exit_code": 70, "reason": "x", "unix_seconds": time.time()}}))
time.sleep(2)
note.unlink()
(folder / "again").touch()
"""
    for restarts in (True, False):
        (tmp_path / "again").unlink(missing_ok=True)
        # in a process of its own: a supervisor ends everything below it, and below this one is the ranks' fork server
        supervised = f"""
import sys
from pathlib import Path
from launchers.supervise import supervisor as supervise
supervise.FAILED_SECONDS = 0.5
supervise.Supervisor(Path({str(tmp_path)!r}), [sys.executable, "-c", {body!r}],
                     by_signal=False, token="t", restarts={restarts}).run()
"""
        subprocess.run([sys.executable, "-c", supervised], check=True, timeout=300)
        assert (tmp_path / "again").exists() == restarts


@pytest.mark.skipif(sys.platform != "linux", reason="finds the launcher's children in /proc")
def test_a_rank_whose_launcher_died_is_asked_to_save(tmp_path):
    """As when Slurm's step daemon is killed, of which Slurm takes no notice."""
    package = tmp_path / "stand-in" / "pretrain"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__path__.append({str(ROOT / 'pretrain')!r})\n")
    (package / "__main__.py").write_text(
        "import signal, sys\n"
        f"def save(*_):\n    open({str(tmp_path / 'saved')!r}, 'w').close()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGUSR1, save)\nsignal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])\n"
        f"open({str(tmp_path / 'up')!r}, 'w').close()\nsignal.pause()\n")
    launcher = ("import subprocess, sys\n"
                "subprocess.run([sys.executable, '-m', 'launchers.supervise.rank_wrapper', sys.argv[1], 'x'])")
    process = subprocess.Popen([sys.executable, "-c", launcher, str(tmp_path)], cwd=tmp_path,
                               env=process_environment() | {"PYTHONPATH": f"{package.parent}:{ROOT}"})
    wait_for((tmp_path / "up").exists)
    process.kill()
    process.wait()
    wait_for((tmp_path / "saved").exists)


def test_the_keeper_notes_how_its_rank_ended(tmp_path):
    package = tmp_path / "stand-in" / "pretrain"
    package.mkdir(parents=True)
    # `python -m pretrain` is a stand-in here; the keeper's own imports come from the project.
    (package / "__init__.py").write_text(f"__path__.append({str(ROOT / 'pretrain')!r})\n")
    (package / "__main__.py").write_text("import os, sys\nprint(sys.argv[1:], flush=True)\n"
                                         "os.kill(os.getpid(), 9) if sys.argv[1] == 'die' else sys.exit(77)\n")
    environ = process_environment() | {
        "PYTHONPATH": f"{package.parent}:{ROOT}", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for word, expected in (("exit", 77), ("die", 137)):
        command = [sys.executable, "-m", "launchers.supervise.rank_wrapper", str(tmp_path), word, "--local_rank=1"]
        done = subprocess.run(command, env=environ, check=False, cwd=tmp_path)
        assert done.returncode == expected
        note = json.loads((tmp_path / "logs" / "exit-rank1.json").read_text())
        assert (note["rank"], note["exit_code"]) == (1, expected)
        assert f"['{word}']" in (tmp_path / "logs" / "rank-1.log").read_text()


def ended(code, reason="x", **more):
    return Status(exit_code=code, reason=reason, **more)


@pytest.mark.parametrize(("status", "action"), [
    (ended(0), "end"), (ended(2), "end"), (ended(3), "end"), (ended(65), "end"),
    (ended(75, "SIGUSR1", checkpoint_step=4), "requeue"),
    (ended(75, "SIGUSR1, and no time was left to save", checkpoint_step=4), "requeue"),
    (ended(75, "SIGTERM", checkpoint_step=4), "end"),
    (ended(70, checkpoint_step=4), "requeue"), (ended(137, checkpoint_step=4), "requeue"), (ended(74), "requeue"),
    (ended(70, history=(asdict(ended(70)),)), "requeue"),
    (ended(70, history=(asdict(ended(70)), asdict(ended(137)))), "hold"),
    (ended(70, checkpoint_step=9, history=(asdict(ended(70)), asdict(ended(137)))), "requeue"),
])
def test_what_follows(status, action):
    assert decide(status, may_requeue=True).action == action
    assert decide(status, may_requeue=False).action == "end"


def test_a_bad_node_is_kept_out():
    assert decide(ended(71, node="n3", checkpoint_step=2), True).bad_nodes == ("n3",)


def test_a_refused_attempt_leaves_the_status_of_the_other_run_alone(tmp_path):
    before = write(tmp_path, Status(reason="running"))
    (tmp_path / "run.lock").write_text('{"attempt_token": "theirs"}')
    assert close(tmp_path, "ours", time.time(), Outcome(2, "refused")) is None
    assert read(tmp_path) == before


def test_notes_of_a_refused_attempt_do_not_concern_the_run_that_goes_on(tmp_path):
    theirs, ours = (replace(alone(), attempt_token=token) for token in ("theirs", "ours"))
    begin(tmp_path, ours, 0, None)
    note_failure(tmp_path, theirs, 0, 2, reason="refused")
    assert read(tmp_path).exit_code is None
    assert first_failure(tmp_path, "ours") is None
    assert first_failure(tmp_path, "theirs").exit_code == 2


def test_notes_of_dead_peers_do_not_hide_the_cause(tmp_path):
    note_failure(tmp_path, alone(), 3, 77, reason="the cause")
    assert os.listdir(tmp_path / "logs") == ["failed-rank0.json"]
    assert read(tmp_path) is None
