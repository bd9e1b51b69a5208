"""`trainyard train`: a run on this machine, or one rank of a run that a launcher started."""

import argparse
from pathlib import Path

from common.errors import ConfigError, TrainyardError, UserError
from common.wording import count
from launchers.local.child_process import usable_cores
from launchers.local.ranks_here import run_local
from parallel.ranks.rank_info import RankInfo, alone, process_environment, read_rank_info
from pretrain.config.run_config import RunConfig, load_run
from pretrain.training.third_party_output import (
    CPU_ADAM_OP,
    SHARED_MEMORY_OP,
    ThirdPartyOutput,
    compile_notice,
    third_party_output,
)

RANKS_PER_CORE = 4


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "train", help="train on this machine", description="Trains what CONFIG describes. Started by torchrun, "
        "deepspeed, mpirun or srun, it joins the ranks it finds."
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings that win over the file")
    parser.add_argument("--nproc", type=int, metavar="N",
                        help="ranks to start on this machine (default: for one model, tensor x context x pipeline)")


def run(args: argparse.Namespace) -> int:
    """Checks the config, then starts the ranks or becomes one. Returns the exit code. Raises TrainyardError."""
    rank_info = read_rank_info()
    check_nproc(args.nproc, rank_info)
    config = _load(args, rank_info)
    world_size = rank_info.world_size if rank_info else args.nproc or config.parallel.model_ranks
    if rank_info is None and args.nproc is None:
        _check_default(world_size)
    if rank_info is None and world_size > 1:
        return run_local(["train", args.config, *args.overrides], world_size, Path(config.run.dir) / "logs")
    return run_rank(config, rank_info or alone())


def run_rank(config: RunConfig, info: RankInfo) -> int:
    """This process's part of the run; what third parties say at start-up goes to the rank's log file."""
    with third_party_output(Path(config.run.dir) / "logs" / f"rank-{info.rank}.log", info.rank == 0) as quiet:
        _tell_of_compiling(quiet, info, config)
        from pretrain.training.loop import train  # torch comes in here, after every check that can do without it

        return train(config, info, quiet)


def _tell_of_compiling(quiet: ThirdPartyOutput, info: RankInfo, config: RunConfig) -> None:
    """The first DeepSpeed start on a CPU, or with offload, takes minutes and would look like a hang."""
    import torch

    ops = [] if torch.cuda.is_available() else [SHARED_MEMORY_OP]
    ops += [CPU_ADAM_OP] if config.parallel.offload != "none" else []
    for op in ops if info.rank == 0 else ():
        notice = compile_notice(process_environment().get("TORCH_EXTENSIONS_DIR"), op)
        if notice:
            quiet.terminal.write(f"{notice}\n")


def check_nproc(nproc: int | None, rank_info: RankInfo | None) -> None:
    if nproc is not None and nproc < 1:
        raise UserError(f"--nproc {nproc}: at least 1 rank is needed")
    if nproc is not None and rank_info is not None:
        raise UserError(f"--nproc {nproc} inside a world of {rank_info.world_size} ranks that {rank_info.source} "
                        "started: leave --nproc out, or start the command without that launcher")


def _check_default(world_size: int) -> None:
    """A layout made for a cluster is not started on a laptop because --nproc was forgotten."""
    most = RANKS_PER_CORE * usable_cores()
    if world_size > most:
        raise UserError(f"one model of this layout takes {world_size} ranks (tensor x context x pipeline), more than "
                        f"the {most} that this machine's {usable_cores()} cores run by default: start it with "
                        f"`trainyard submit`, torchrun or srun, say --nproc {world_size} to start them all here, or "
                        "lower these degrees")


def _load(args: argparse.Namespace, rank_info: RankInfo | None) -> RunConfig:
    """The checked config. Every rank finds the same problems: rank 0 shows them all, the others only the first."""
    try:
        return load_run(args.config, args.overrides, rank_info.world_size if rank_info else args.nproc)
    except ConfigError as error:
        if rank_info is None or rank_info.rank == 0:
            raise
        first = error.problems[0]
        raise TrainyardError(f"rank {rank_info.rank} on {rank_info.node}: {count(len(error.problems), 'problem')} with "
                             f"the config, first: {first.where}: {first.asked}", error.exit_code) from None
