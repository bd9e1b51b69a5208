"""Slurm: a Job as the text of a batch script, and the words of the commands around it. Pure functions."""

import shlex
from pathlib import Path

from launchers.job import Job

# Explicit, because Slurm would keep the whole environment of the submitter, with its secrets.
EXPORTED = ("HOME", "USER", "LOGNAME", "PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV",
            "CONDA_PREFIX", "CUDA_HOME", "TORCH_EXTENSIONS_DIR", "OMP_NUM_THREADS")


def script(job: Job) -> str:
    """The batch script. Every value is quoted for the shell; those in #SBATCH lines are of a checked form."""
    return "\n".join([
        "#!/bin/bash",
        f"# Trainyard job {job.name}: {job.nodes} nodes x {job.ranks_per_node} ranks, written by `trainyard submit`.",
        *(f"#SBATCH {word}" for word in _options(job)),
        "set -euo pipefail",
        "umask 027",
        f"cd {shlex.quote(str(job.work_dir))}",
        *_element(job),
        'mkdir -p "$folder/logs"',
        # Slurm would read % and spaces in a file name of its own --output in its own way.
        'exec >>"$folder/logs/slurm-$SLURM_JOB_ID.out" 2>&1',
        *(f"export {name}={shlex.quote(value)}" for name, value in job.variables),
        # The address by which Slurm itself knows the first node; ranks fall back on the node's name.
        'first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        'address=$(scontrol --oneliner show node "$first_node" | grep -o "NodeAddr=[^ ]*" | cut -d= -f2) || address=',
        *_address(job),
        f"{_supervisor(job)} \\",
        f"  {_srun(job)} \\",
        f"  {_rank(job)}",
        "",
    ])


def submit_argv(script_path: Path | str, after: str | None = None) -> list[str]:
    """The command that submits a script, after the end (however it came) of another job if one is given."""
    chain = [f"--dependency=afterany:{after}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *chain, str(script_path)]


def check_argv(script_path: Path | str) -> list[str]:
    """The command that asks Slurm whether it would take a script, without submitting it."""
    return ["sbatch", "--test-only", str(script_path)]


def cancel_argv(job_id: str) -> list[str]:
    return ["scancel", job_id]


def state_argv(job_id: str) -> list[str]:
    """Prints state, reason and the time left, one line for each element of an array."""
    return ["squeue", "--noheader", "--states=all", "--jobs", job_id, "--format", "%i|%T|%r|%L|%N"]


def _options(job: Job) -> list[str]:
    slurm = job.slurm
    given = {
        "job-name": job.name, "nodes": job.nodes, "ntasks": job.world_size, "ntasks-per-node": job.ranks_per_node,
        "partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "time": slurm.time,
        "constraint": slurm.constraint, "reservation": slurm.reservation, "gpus-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_task, "mem": slurm.memory, "exclude": slurm.exclude,
        "array": f"0-{len(job.array) - 1}" if job.array else None,
        "signal": f"B:USR1@{slurm.signal_seconds}" if slurm.signal_seconds else None,
        "output": "/dev/null", "export": ",".join((*EXPORTED, *job.exported)),
    }
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    # Appended: one file for all attempts of a job.
    return [*options, "--open-mode=append", "--requeue" if slurm.requeue else "--no-requeue"]


def _element(job: Job) -> list[str]:
    """Run folder and overrides; for an array those of this element."""
    if not job.array:
        return [f"folder={shlex.quote(str(job.folder))}", "overrides=()"]
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for index, overrides in enumerate(job.array):
        words = " ".join(shlex.quote(word) for word in overrides)
        folder = shlex.quote(str(element_folder(job, overrides)))
        lines.append(f"  {index}) folder={folder}; overrides=({words}) ;;")
    return [*lines, "  *) exit 2 ;;", "esac"]


def element_folder(job: Job, overrides: tuple[str, ...]) -> Path:
    """Run folder of one element of an array, from its run.dir override."""
    for word in reversed(overrides):
        if word.startswith("run.dir="):
            return job.work_dir / word.removeprefix("run.dir=")
    return job.folder


def _address(job: Job) -> list[str]:
    if job.master_address is not None:
        return [f"export MASTER_ADDR={shlex.quote(job.master_address)}"]
    return ['[ -z "$address" ] || export MASTER_ADDR="$address"']


def _supervisor(job: Job) -> str:
    slurm = job.slurm
    words = ["exec", job.python, "-m", "launchers.supervise", "--slurm"]
    if slurm.requeue and slurm.chain == 1:
        words.append("--requeue")
    if slurm.node_check:
        words.append(f"--check-nodes={job.nodes}")
        words.append(f"--devices={job.ranks_per_node if slurm.gpus_per_node else 0}")
    return f'{shlex.join(words)} "$folder" --'


def _srun(job: Job) -> str:
    tasks = job.nodes if job.slurm.torchrun_inside else job.world_size
    per_node = 1 if job.slurm.torchrun_inside else job.ranks_per_node
    words = ["srun", f"--nodes={job.nodes}", f"--ntasks={tasks}", f"--ntasks-per-node={per_node}", "--export=ALL",
             "--kill-on-bad-exit=1", "--mpi=none", "--input=none"]
    if job.slurm.cpus_per_task:
        threads = job.slurm.cpus_per_task * (job.ranks_per_node if job.slurm.torchrun_inside else 1)
        words.append(f"--cpus-per-task={threads}")
    if job.slurm.image:
        words.append(f"--container-image={job.slurm.image}")
    if job.slurm.mounts:
        words.append(f"--container-mounts={job.slurm.mounts}")
    return shlex.join(words)


def _rank(job: Job) -> str:
    train = shlex.join(job.train)
    if job.slurm.torchrun_inside:
        torchrun = [job.python, "-m", "torch.distributed.run", f"--nnodes={job.nodes}",
                    f"--nproc-per-node={job.ranks_per_node}", "--rdzv-backend=c10d"]
        # The port differs from that of other jobs on the node, and is known before the agents start.
        endpoint = '--rdzv-endpoint="$first_node:$((20000 + SLURM_JOB_ID % 12000))" --rdzv-id="$SLURM_JOB_ID"'
        return f'{shlex.join(torchrun)} {endpoint} -m launchers.one_rank "$folder" {train} "${{overrides[@]}}"'
    return f'{shlex.join([job.python, "-m", "launchers.one_rank"])} "$folder" {train} "${{overrides[@]}}"'
