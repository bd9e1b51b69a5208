"""Rows on a real Slurm: F1, F2, F5 to F8, F10 to F14, E8."""

from __future__ import annotations

import datetime
import os
import signal
import time
from pathlib import Path

from launchers.run_folder.status import read
from tests.faults.bench import (
    INJECT,
    ROOT,
    RUN,
    STEPS,
    Bench,
    Trial,
    check_end,
    check_goes_on,
    check_saved,
    last_step,
    parent_of,
    processes_of,
    ranks_of,
)
from tests.helpers.slurm import wait_until

START_SECONDS = 900
TWO_NODES = ("--nodes", "2", "--time", "30")
ENDLESS = ("run.steps=100000", "checkpoint.every=200", "checkpoint.keep=2")


def submit(bench: Bench, trial: Trial, *words: str, num_ranks: int = 1, run: tuple[str, ...] = RUN,
           **environ: str) -> str:
    """Submits with this many ranks a node; returns the job's number."""
    done = bench.trainyard(*bench.submit_words(trial.run, "slurm", *words, num_ranks=num_ranks, run=run), **environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[2].rstrip(":,")


def wait_for_step(bench: Bench, trial: Trial, job_id: str, step: int) -> None:
    def reached() -> bool:
        assert bench.cluster.job(job_id)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), log(trial.run)
        return last_step(trial.run) >= step

    wait_until(reached, START_SECONDS, f"step {step}")


def log(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted((folder / "logs").glob("slurm-*.out")))


def finish(bench: Bench, trial: Trial, job_id: str, restarts: int = 1) -> None:
    """A requeued job runs to its end and repeats the undisturbed run."""
    bench.cluster.start_requeued_now(job_id, seconds=300)
    assert bench.cluster.wait_for_state(job_id) == "COMPLETED", log(trial.run)
    assert bench.cluster.job(job_id)["Restarts"] == str(restarts)
    check_end(trial.run, bench.reference(2), whole=True)


def before_the_time_limit(bench: Bench, trial: Trial) -> None:
    """F1: Slurm's own warning. The save is complete 10 s before the limit, and the job goes on by itself."""
    endless = ("checkpoint.every=0", "schedule.decay_steps=240", "parallel.global_batch=32")
    job_id = submit(bench, trial, "--time", "4", "--signal-seconds", "60", num_ranks=2,
                    run=(*endless, "run.steps=1000000"))
    cluster = bench.cluster
    wait_until(lambda: cluster.job(job_id)["JobState"] == "RUNNING", 1800, "the job runs")
    end = datetime.datetime.fromisoformat(cluster.job(job_id)["EndTime"]).timestamp()
    cluster.wait_for_state(job_id, "PENDING", seconds=400)
    status = read(trial.run)
    check_saved(status, "SIGUSR1")
    trial.facts["saved_before_limit_seconds"] = round(end - status.updated_unix_seconds, 1)
    assert end - status.updated_unix_seconds >= 10, status
    cluster.start_requeued_now(job_id)
    wait_until(lambda: last_step(trial.run) > status.last_step, START_SECONDS, "the second attempt trains")
    (trial.run / "STOP").touch()
    assert cluster.wait_for_state(job_id) == "COMPLETED", log(trial.run)
    trial.facts["steps"] = [status.last_step, last_step(trial.run)]
    check_end(trial.run, bench.reference(2, endless, at_least=last_step(trial.run)))


def cancelled(bench: Bench, trial: Trial) -> None:
    """F2: SIGTERM, and SIGKILL when the grace period is over. Saved or not, but nothing is partial, or comes back."""
    job_id = submit(bench, trial, *TWO_NODES)
    wait_for_step(bench, trial, job_id, trial.random.randrange(1, 120))
    done = bench.trainyard("cancel", str(trial.run))
    assert done.returncode == 0, done.stderr
    assert bench.cluster.wait_for_state(job_id) == "CANCELLED"
    status = check_end(trial.run, bench.reference(2))
    trial.facts |= {"reason": status.reason, "step": status.last_step}
    check_saved(status, "SIGTERM")
    assert bench.cluster.job(job_id)["Restarts"] == "0"
    if trial.number == 0:
        check_goes_on(bench, trial)


def to_every_process(bench: Bench, trial: Trial) -> None:
    """F5: the warning goes to every process of the step, loader workers too. They live on until their rank ends."""
    job_id = submit(bench, trial, *TWO_NODES, run=(*RUN, "data.workers=2"))
    wait_for_step(bench, trial, job_id, trial.random.randrange(3, 100))
    bench.cluster.run("scancel", "--full", "--signal=USR1", job_id)
    wait_until(lambda: read(trial.run).exit_code is not None, 120, "the end of the attempt")
    check_saved(read(trial.run), "SIGUSR1")
    rank_logs = (path.read_text(errors="replace") for path in (trial.run / "logs").glob("rank-*.log"))
    text = "".join([log(trial.run), *rank_logs])
    assert "killed by signal" not in text, text
    assert "exited unexpectedly" not in text, text
    finish(bench, trial, job_id)


def lost_node(bench: Bench, trial: Trial) -> None:
    """F6: a node dies, or is set down. The job is requeued on others and repeats what was not saved."""
    cluster, dies = bench.cluster, trial.number % 2 == 0
    job_id = submit(bench, trial, *TWO_NODES)
    wait_for_step(bench, trial, job_id, trial.random.randrange(45, 150))
    nodes = read(trial.run).nodes
    lost = nodes[trial.random.randrange(2)]
    trial.facts |= {"node": lost, "dies": dies}
    if dies:
        cluster.kill_node(lost)
    cluster.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    try:
        cluster.start_requeued_now(job_id, seconds=300)
        is_down = cluster.node_states()[lost].startswith("down")  # one that only was set down comes back by itself
        wait_until(lambda: cluster.job(job_id)["JobState"] == "RUNNING", 60, "the job runs again")
        started = time.monotonic()
        wait_until(lambda: read(trial.run).attempt == 2 and read(trial.run).exit_code is None, 300, log(trial.run))
        begun = read(trial.run).first_step
        wait_until(lambda: last_step(trial.run) > begun or read(trial.run).exit_code == 0, 300, "a new step")
        trial.facts["first_step_after_seconds"] = round(time.monotonic() - started, 1)
        assert cluster.wait_for_state(job_id) == "COMPLETED", log(trial.run)
    finally:
        if dies:
            cluster.start_node(lost)
        if cluster.node_states()[lost].startswith("down"):
            cluster.run("scontrol", "update", f"nodename={lost}", "state=resume")
    status = check_end(trial.run, bench.reference(2), whole=True)
    assert lost not in status.nodes or not is_down, status
    assert cluster.job(job_id)["Restarts"] == "1"
    assert trial.facts["first_step_after_seconds"] <= 60, trial.facts


def controller_away(bench: Bench, trial: Trial) -> None:
    """F7: the controller is gone for 10 s. The run does not notice."""
    cluster = bench.cluster
    job_id = submit(bench, trial, *TWO_NODES)
    wait_for_step(bench, trial, job_id, 10)
    time.sleep(6)  # the controller saves its state up to 5 s late
    cluster.kill_controller()
    time.sleep(10)
    cluster.start_controller()
    assert cluster.wait_for_state(job_id) == "COMPLETED", log(trial.run)
    assert cluster.job(job_id)["Restarts"] == "0"
    check_end(trial.run, bench.reference(2), whole=True)


def exit_code_under_srun(bench: Bench, trial: Trial) -> None:
    """F8: a rank ends with 77 under srun. The job ends with 77, the report names it and shows its traceback."""
    rank, marker = trial.random.randrange(2), trial.folder / "now"
    fault = [word for name, text in (("FAULT_FILE", str(marker)), ("FAULT_RANK", str(rank)), ("FAULT_CODE", "77"))
             for word in ("--env", f"{name}={text}")]
    job_id = submit(bench, trial, *TWO_NODES, "--no-requeue", *fault, PYTHONPATH=f"{INJECT}:{ROOT}")
    wait_for_step(bench, trial, job_id, trial.random.randrange(3, 60))
    marker.touch()
    assert bench.cluster.wait_for_state(job_id) == "FAILED"
    assert bench.cluster.job(job_id)["ExitCode"] == "77:0"
    status = check_end(trial.run, bench.reference(2))
    assert (status.exit_code, status.rank, status.node) == (77, rank, status.nodes[rank]), status
    assert f"rank {rank} on {status.node} failed with exit code 77" in log(trial.run)
    assert "InjectedFault" in log(trial.run)


def no_progress(bench: Bench, trial: Trial) -> None:
    """F10: three attempts without a new checkpoint. The job is held, and says why."""
    cluster = bench.cluster
    broken = ("run.steps=100", "checkpoint.every=50", "optimizer.lr=1e30", "optimizer.clip_norm=0",
              "schedule.warmup_steps=0")
    job_id = submit(bench, trial, run=broken)
    for attempt in (1, 2, 3):
        wait_until(lambda count=attempt: read(trial.run) is not None and read(trial.run).attempt == count
                   and read(trial.run).exit_code == 70, START_SECONDS, f"attempt {attempt} fails: {log(trial.run)}")
        cluster.wait_for_state(job_id, "PENDING", seconds=120)
        if attempt < 3:
            cluster.start_requeued_now(job_id)
    wait_until(lambda: "held" in cluster.job(job_id)["Reason"].lower(), 60, "the job is held")
    assert "hold: 3 attempts without a new checkpoint" in log(trial.run)
    assert "nodes kept out" not in log(trial.run)  # a gradient that is not finite is no node's fault
    said = bench.trainyard("status", str(trial.run)).stdout
    assert "held" in said.lower(), said
    assert "the gradient norm is nan" in said, said
    cluster.run("scancel", job_id)


def chain(bench: Bench, trial: Trial) -> None:
    """F11: five short jobs, each after the end of the one before, are one long run, and never two at once."""
    cluster = bench.cluster
    done = bench.trainyard(*bench.submit_words(trial.run, "slurm", *TWO_NODES, "--chain", "5", num_ranks=1))
    assert done.returncode == 0, done.stderr
    job_ids = done.stdout.split(":")[0].removeprefix("submitted job ").split(", ")
    assert len(job_ids) == 5
    for number, job_id in enumerate(job_ids):
        if number < 4:
            wait_for_step(bench, trial, job_id, 10 + number * STEPS // 6 + trial.random.randrange(20))
            running = [other for other in job_ids if cluster.job(other)["JobState"] == "RUNNING"]
            assert running == [job_id], running
            cluster.run("scancel", "--batch", "--signal=USR1", job_id)
        cluster.wait_for_state(job_id)
    status = check_end(trial.run, bench.reference(2), whole=True)
    entries = [*status.history, vars(status)]
    assert [entry["exit_code"] for entry in entries] == [75] * 4 + [0], status
    assert [entry["job_id"] for entry in entries] == job_ids
    assert all(before["updated_unix_seconds"] < after["started_unix_seconds"]
               for before, after in zip(entries, entries[1:], strict=False))


def second_writer(bench: Bench, trial: Trial) -> None:
    """F12: a second job on the run folder is refused; a lock whose job is gone is taken over."""
    (refused if trial.number % 2 == 0 else taken_over)(bench, trial)


def refused(bench: Bench, trial: Trial) -> None:
    job_id = submit(bench, trial, run=ENDLESS)
    wait_for_step(bench, trial, job_id, 5)
    done = bench.trainyard(*bench.submit_words(trial.run, "slurm", num_ranks=1, run=ENDLESS))
    assert done.returncode == 2, done.stderr
    assert f"job {job_id}" in done.stderr
    assert "choose another run.dir" in done.stderr
    # Past the check of `submit`, as when both are submitted before either starts.
    second = bench.cluster.run("sbatch", "--parsable", str(trial.run / "logs" / "job.sbatch")).strip()
    assert bench.cluster.wait_for_state(second) == "FAILED"
    assert bench.cluster.job(second)["ExitCode"] == "2:0"
    assert f"job {job_id}" in log(trial.run)
    before = last_step(trial.run)
    wait_for_step(bench, trial, job_id, before + 5)  # the first one goes on
    (trial.run / "STOP").touch()
    assert bench.cluster.wait_for_state(job_id) == "COMPLETED", log(trial.run)
    assert (read(trial.run).exit_code, read(trial.run).job_id) == (0, job_id)


def taken_over(bench: Bench, trial: Trial) -> None:
    first = submit(bench, trial, *TWO_NODES, "--no-requeue")
    wait_for_step(bench, trial, first, 60)
    os.kill(ranks_of(trial.run)[0], signal.SIGKILL)
    assert bench.cluster.wait_for_state(first) == "FAILED"
    assert (trial.run / "run.lock").exists()
    job_id = submit(bench, trial, *TWO_NODES)
    assert bench.cluster.wait_for_state(job_id) == "COMPLETED", log(trial.run)
    check_end(trial.run, bench.reference(2), whole=True)


def kill_switch(bench: Bench, trial: Trial) -> None:
    """F13: the file STOP saves and ends the run for good."""
    job_id = submit(bench, trial, *TWO_NODES)
    wait_for_step(bench, trial, job_id, trial.random.randrange(3, 100))
    (trial.run / "STOP").touch()
    assert bench.cluster.wait_for_state(job_id) == "COMPLETED", log(trial.run)
    status = check_end(trial.run, bench.reference(2))
    assert (status.exit_code, status.reason) == (0, "STOP"), status
    assert status.checkpoint_step == status.last_step
    assert bench.cluster.job(job_id)["Restarts"] == "0"


SHIPPED = ROOT / "slurm" / "train.sbatch"
F14 = {
    "nodes": ("--nodes", "9", "More processors requested than permitted"),
    "gpus": ("--gpus-per-node", "8", "generic resource"),
    "time": ("--time", "99-0", "time limit"),
    "partition": ("--partition", "nowhere", "invalid partition"),
    "constraint": ("--constraint", "imaginary", "feature"),
    "cpus": ("--cpus-per-task", "64", "More processors requested than permitted"),
    "excluded node": ("--exclude", "no-such-node", "Invalid node name"),
    "crlf": ("--template", lambda text: text.replace("\n", "\r\n"), "DOS line breaks"),
    "no shebang": ("--template", lambda text: text.partition("\n")[2], "does not look like a batch script"),
}


def impossible_request(bench: Bench, trial: Trial) -> None:
    """F14: what Slurm would refuse, or let wait for ever, ends with code 2 and Slurm's own words."""
    case = list(F14)[trial.number % len(F14)]
    trial.facts["case"] = case
    option, value, words = F14[case]
    if callable(value):
        template = trial.folder / "template"
        template.write_text(value(SHIPPED.read_text()), newline="")
        value = str(template)
    batch = ("parallel.global_batch=36",) if case == "nodes" else ()
    queued = bench.cluster.run("squeue", "-h", "-o", "%i")
    done = bench.trainyard(*bench.submit_words(trial.run, "slurm", "--nodes", "2", "--time", "30", option, value,
                                               run=(*RUN, *batch)))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "sbatch: error" in done.stderr, done.stderr
    assert words.lower() in done.stderr.lower(), done.stderr
    assert "nothing was submitted" in done.stderr
    assert bench.cluster.run("squeue", "-h", "-o", "%i") == queued


def step_daemon_killed(bench: Bench, trial: Trial) -> None:
    """E8: the step daemon of one node is killed, of which Slurm takes no notice. The job ends and is requeued."""
    job_id = submit(bench, trial, *TWO_NODES)
    wait_for_step(bench, trial, job_id, trial.random.randrange(45, 120))
    keeper = parent_of(ranks_of(trial.run)[1])
    daemon = parent_of(keeper)
    assert b"slurmstepd" in Path(f"/proc/{daemon}/cmdline").read_bytes()
    os.kill(daemon, signal.SIGKILL)
    at = time.monotonic()
    wait_until(lambda: bench.cluster.job(job_id)["JobState"] != "RUNNING", 180, f"the job ends: {log(trial.run)}")
    trial.facts["ended_after_seconds"] = round(time.monotonic() - at, 1)
    wait_until(lambda: not processes_of(trial.run), 60, "no rank is left")
    finish(bench, trial, job_id)


def bad_node(bench: Bench, trial: Trial) -> None:
    """Beside the rows: a node that cannot write the run folder is named and kept out."""
    cluster = bench.cluster
    (trial.run / "logs").mkdir(parents=True)
    cluster.on_node("n2", "mount", "--bind", "-o", "ro", str(trial.run), str(trial.run))
    try:
        job_id = submit(bench, trial, *TWO_NODES, run=("run.steps=12",))
        wait_until(lambda: "nodes kept out" in log(trial.run), 300, "the check of the nodes fails")
        status = read(trial.run)
        assert (status.exit_code, status.node) == (71, "n2"), status
        assert "node n2 cannot train" in status.reason, status
        assert "Read-only file system" in status.reason, status
        assert cluster.job(job_id)["ExcNodeList"] == "n2"
        cluster.start_requeued_now(job_id)
        assert cluster.wait_for_state(job_id) == "COMPLETED", log(trial.run)
    finally:
        cluster.on_node("n2", "umount", str(trial.run))
    assert read(trial.run).nodes == ("n1", "n3")
