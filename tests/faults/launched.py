"""Rows F8, F9, F15, F16, J8: launchers of one machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from launchers.run_folder.status import read
from parallel.ranks.rank_info import read_rank_info
from tests.faults.bench import (
    INJECT,
    ROOT,
    Bench,
    Trial,
    check_end,
    launcher_processes,
    processes_of,
    ranks_of,
)
from tests.helpers.slurm import wait_until

LOOPBACK_HEX = {"0100007F", "00000000000000000000000001000000"}
TORCHRUN, RUNNER, LAUNCH = b"torch.distributed.run", b"deepspeed.launcher.runner", b"deepspeed.launcher.launch"
SHORT = ("run.steps=12", "checkpoint.every=6")


def exit_code_under_deepspeed(bench: Bench, trial: Trial) -> None:
    """F8: a rank ends with 77; the command says so and names the rank."""
    rank, marker = trial.random.randrange(2), trial.folder / "now"
    fault = {"FAULT_FILE": str(marker), "FAULT_RANK": str(rank), "FAULT_CODE": "77", "PYTHONPATH": f"{INJECT}:{ROOT}"}
    with bench.started(trial, bench.submit_words(trial.run, "deepspeed"), **fault) as started:
        started.wait_for_step(trial.random.randrange(3, 60))
        marker.touch()
        assert started.wait(120) == 77, started.said
        assert f"rank {rank} on" in started.said
        assert "failed with exit code 77" in started.said
        assert "InjectedFault" in started.said
    status = check_end(trial.run, bench.reference(2))
    assert (status.exit_code, status.rank) == (77, rank), status


OUTER, MIDDLE, TOP = RUNNER, LAUNCH, b"launchers.supervise.supervisor"
F9 = [(module, number) for module in (OUTER, MIDDLE, TOP)
      for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)]


def killed_launcher(bench: Bench, trial: Trial) -> None:
    """F9: a process above the ranks is signalled. No rank outlives it by 15 s, and the result is not 0."""
    module, number = F9[trial.number % len(F9)]
    trial.facts |= {"process": module.decode(), "signal": signal.Signals(number).name}
    with bench.started(trial, bench.submit_words(trial.run, "deepspeed")) as started:
        started.wait_for_step(trial.random.randrange(3, 60))
        pids = launcher_processes(trial.run, module)
        assert len(pids) == 1, pids
        os.kill(pids[0], number)
        code = started.wait(60)
        trial.facts["code"] = code
        assert code != 0
        # Where the supervisor itself was killed, nobody is left to complete the status but the ranks.
        check_end(trial.run, bench.reference(2))


def meeting_places(bench: Bench, trial: Trial) -> None:
    """F15: taken ports and names without an address."""
    case = F15[trial.number % len(F15)]
    trial.facts["case"] = case.__name__
    case(bench, trial)


def candidate_ports_taken(bench: Bench, trial: Trial) -> None:
    """The ports that follow from the job are taken: all ranks agree on the next free one."""
    environs = [{"SLURM_JOB_ID": str(4000 + trial.number), "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank),
                 "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1",
                 "SLURM_STEP_TASKS_PER_NODE": "2"} for rank in range(2)]
    ports = read_rank_info(environs[0]).ports
    with ExitStack() as stack:
        for port in ports[:2]:
            taken = stack.enter_context(socket.socket())
            taken.bind(("127.0.0.1", port))
            taken.listen()
        _ranks(bench, trial, environs, [0, 0])
    check_end(trial.run, bench.reference(2, SHORT), whole=True)


def chosen_port_taken(bench: Bench, trial: Trial) -> None:
    """A port that a person chose is taken: an error that names host, address and port, and code 2."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = _ranks(bench, trial, [_exported(0, "127.0.0.1", port)], [2])[0]
    for word in (socket.gethostname(), "127.0.0.1", str(port), "in use", "MASTER_PORT"):
        assert word in said, said


def name_without_address(bench: Bench, trial: Trial) -> None:
    """The name of the first node leads nowhere."""
    said = _ranks(bench, trial, [_exported(0, "no-such-host.invalid", 29500)], [2])[0]
    for word in (socket.gethostname(), "no-such-host.invalid", "has no address", "MASTER_ADDR"):
        assert word in said, said


def port_taken_at_submission(bench: Bench, trial: Trial) -> None:
    """Seen before anything is started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = bench.trainyard(*bench.submit_words(trial.run, "torchrun", "--master-port", str(port)))
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{port}" in done.stderr
    assert "in use" in done.stderr
    assert not trial.run.exists()


def two_jobs_on_one_node(bench: Bench, trial: Trial) -> None:
    """Two jobs share a node and do not meet."""
    runs = [trial.folder / name for name in ("run-a", "run-b")]
    commands = [[sys.executable, "-m", "pretrain", *bench.submit_words(run, "torchrun", run=SHORT)] for run in runs]
    started = [subprocess.Popen(command, env=bench.environ(), cwd=ROOT, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL) for command in commands]
    assert [process.wait(timeout=400) for process in started] == [0, 0]
    for run in runs:
        check_end(run, bench.reference(2, SHORT), whole=True)


F15 = (candidate_ports_taken, chosen_port_taken, name_without_address, port_taken_at_submission, two_jobs_on_one_node)


def _exported(rank: int, address: str, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _ranks(bench: Bench, trial: Trial, environs: list[dict[str, str]], codes: list[int]) -> list[str]:
    command = [sys.executable, "-m", "pretrain", "train", str(bench.recipe), f"run.dir={trial.run}", *SHORT]
    started = [subprocess.Popen(command, env=bench.environ(**more), cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True) for more in environs]
    said = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == codes, said
    return said


def every_launcher(bench: Bench, trial: Trial) -> None:
    """F16: the same losses to the last bit."""
    name = F16[trial.number % len(F16)]
    trial.facts["launcher"] = name
    num_ranks = 1 if name == "single process" else 2
    commands = _commands(bench, trial, name)
    started = [subprocess.Popen([sys.executable, "-m", "pretrain", *words], env=bench.environ(), cwd=ROOT,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for words in commands]
    said = [process.communicate(timeout=500)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(commands), "\n".join(said)
    expected = bench.reference(num_ranks, SHORT)
    status = check_end(trial.run, expected, whole=True)
    assert status.exit_code == 0, status


F16 = ("single process", "torchrun", "deepspeed local", "deepspeed --no_ssh", "deepspeed --launcher openmpi",
       "deepspeed --launcher slurm", "srun")


def _commands(bench: Bench, trial: Trial, name: str) -> list[list[str]]:
    """What a person types: with --no_ssh on each of two nodes, which are both this machine here."""
    hostfile = trial.folder / "hostfile"
    slots = {"deepspeed --no_ssh": "127.0.0.1 slots=1\nlocalhost slots=1\n",
             "deepspeed --launcher slurm": "n1 slots=2\n"}
    hostfile.write_text(slots.get(name, "localhost slots=2\n"))
    given = {
        "single process": ("torchrun", 1, ()),
        "torchrun": ("torchrun", 2, ()),
        "deepspeed local": ("deepspeed", 2, ()),
        "deepspeed --launcher openmpi": ("deepspeed", 2, ("--remote", "openmpi", "--hostfile", str(hostfile))),
        "deepspeed --launcher slurm": ("deepspeed", 2, ("--remote", "slurm", "--hostfile", str(hostfile))),
        "srun": ("slurm", 2, ("--wait",)),
    }
    if name == "deepspeed --no_ssh":
        return [bench.submit_words(trial.run, "deepspeed", "--no-ssh", "--nodes", "2", "--node-rank", str(rank),
                                   "--master-address", "127.0.0.1", "--master-port", str(23000 + trial.seed % 1000),
                                   "--hostfile", str(hostfile), num_ranks=1, run=SHORT) for rank in range(2)]
    launcher, num_ranks, words = given[name]
    return [bench.submit_words(trial.run, launcher, *words, num_ranks=num_ranks, run=SHORT)]


J8 = ("local", "torchrun", "deepspeed", "mpi", "slurm")


def open_ports(bench: Bench, trial: Trial) -> None:
    """J8: while it trains, nothing of the run listens beyond loopback (of mpirun: none of its ranks)."""
    name = J8[trial.number % len(J8)]
    trial.facts["launcher"] = name
    words = bench.train_words(trial.run) if name == "local" else bench.submit_words(
        trial.run, name, *(["--wait"] if name == "slurm" else []))
    with bench.started(trial, words) as started:
        started.wait_for_step(5)
        pids = list(ranks_of(trial.run).values()) if name == "mpi" else processes_of(trial.run)
        assert len(pids) >= 2
        addresses = [address for pid in pids for address in _listens(pid)]
        trial.facts["listening"] = len(addresses)
        assert addresses, "even the ranks' own sockets were not seen"
        assert set(addresses) <= LOOPBACK_HEX, addresses
        (trial.run / "STOP").touch()
        assert started.wait(120) == 0, started.said
    assert check_end(trial.run, bench.reference(2)).reason == "STOP"


def _listens(pid: int) -> list[str]:
    """Addresses on which a process listens, in hex as the kernel shows them."""
    own = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            own.add(os.readlink(link))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.append(fields[1].split(":")[0])
    return found


def elastic_restart(bench: Bench, trial: Trial) -> None:
    """Beside the rows: torchrun with an elastic rendezvous starts a killed rank's world again, by itself."""
    port = str(24000 + trial.seed % 1000)
    words = ("--elastic", "1:1", "--restarts", "2", "--master-address", "127.0.0.1", "--master-port", port)
    with bench.started(trial, bench.submit_words(trial.run, "torchrun", *words)) as started:
        started.wait_for_step(50)
        os.kill(ranks_of(trial.run)[1], signal.SIGKILL)
        wait_until(lambda: (read(trial.run).attempt, read(trial.run).exit_code) == (2, None), 300, "the second attempt")
        assert started.wait(400) == 0, started.said
    status = check_end(trial.run, bench.reference(2), whole=True)
    assert [entry["exit_code"] for entry in status.history] == [137], status
