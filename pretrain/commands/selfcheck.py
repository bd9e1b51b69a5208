"""`trainyard selfcheck`: whether these ranks could train together, before a run finds out."""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError, UserError
from common.files import writing
from common.wording import count
from launchers.local.ranks_here import run_local
from launchers.run_folder.notes import note_of_node, write_note_of_node
from launchers.supervise.node_check import devices_here, problems
from parallel.ranks.rank_info import RankInfo, alone, read_rank_info
from pretrain.commands.train import check_nproc
from pretrain.config.run_config import RunConfig, load_run
from pretrain.training.third_party_output import third_party_output

if TYPE_CHECKING:
    from pretrain.selfcheck.check import Report

DEVICE_MIB, HOST_MIB = 64, 1
MAX_SHOWN = 20
FREE = {"memory": "free_host_bytes", "device": "free_device_bytes", "run folder": "free_disk_bytes"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "selfcheck", help="whether these ranks could train together", description="Compares what the ranks see (code, "
        "config, files, versions, clocks, memory), tests every collective on every axis of CONFIG's layout against its "
        "known answer, and measures it. Started by torchrun, deepspeed, mpirun or srun, it joins the ranks it finds. "
        "Exit code 71 when a rank differs or fails."
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file of the run; without one all ranks form "
                        "one group")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings that win over the file")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks to start on this machine (default: what one "
                        "model needs; without CONFIG one for each device, 2 without devices)")
    parser.add_argument("--mib", type=int, metavar="N", help="size of the buffer in each collective, in MiB (default: "
                        f"{DEVICE_MIB} on devices, {HOST_MIB} without)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", default=60.0, help="how long a rank waits for "
                        "another (default: 60)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")


def run(args: argparse.Namespace) -> int:
    """Starts the ranks or becomes one. Returns the exit code."""
    info = read_rank_info()
    check_nproc(args.nproc, info)
    for name, value in (("--mib", args.mib), ("--timeout", args.timeout)):
        if value is not None and not 0 < value <= 2**16:
            raise UserError(f"{name} {value}: a number above 0 and at most {2**16} is needed")
    if info is None:
        if args.config:  # checked here, so that a mistake is shown once and not by every rank
            config = load_run(args.config, args.overrides, args.nproc)
            nproc = args.nproc or config.parallel.model_ranks
        else:
            nproc = args.nproc or devices_here() or 2
        if nproc > 1:
            return run_local(_words(args), nproc, None)
    return _run_rank(args, info or alone())


def _words(args: argparse.Namespace) -> list[str]:
    """The command line of one rank."""
    words = ["selfcheck", *([args.config] if args.config else []), *args.overrides, f"--timeout={args.timeout}"]
    return words + ([f"--mib={args.mib}"] if args.mib else []) + (["--json"] if args.json else [])


def _run_rank(args: argparse.Namespace, info: RankInfo) -> int:
    config, error = None, None
    if args.config:
        try:
            config = load_run(args.config, args.overrides, info.world_size)
        except ConfigError as refused:
            error = refused  # kept for now: the other ranks wait for this one
    with (tempfile.TemporaryDirectory(prefix="trainyard-selfcheck-") as folder,
          third_party_output(Path(folder) / f"rank-{info.rank}.log", info.rank == 0) as quiet):
        import torch  # not before the arguments are checked

        from pretrain.selfcheck.check import check

        mib = args.mib or (DEVICE_MIB if torch.cuda.is_available() else HOST_MIB)
        report = check(info, config, error, _node_problems(info), num_bytes=mib << 20, timeout_seconds=args.timeout)
        if info.rank == 0:
            quiet.terminal.write((report.as_json() if args.json else "\n".join(_lines(report))) + "\n")
            _note(report, config)
    return report.exit_code


def _node_problems(info: RankInfo) -> list[str]:
    """What is wrong with the node as such, told by the first rank on it."""
    if info.local_rank > 0:
        return []
    return problems(None, info.local_world_size if devices_here() else 0)


def _note(report: "Report", config: RunConfig | None) -> None:
    """Inside a supervised attempt at a run, `trainyard status` shall name the node."""
    if config and report.findings and report.info.attempt_token:
        first = report.findings[0]
        reason = f"node {first.node}, rank {first.rank}: {first.text}"
        folder = Path(config.run.dir)
        with writing(folder):
            write_note_of_node(folder, note_of_node(report.info, first.node, reason))


def _lines(report: "Report") -> Iterator[str]:
    info, reports, same = report.info, report.reports, report.reports[0]["same"]
    nodes = len({rank["node"] for rank in reports})
    yield (f"Trainyard selfcheck: {count(info.world_size, 'rank')} on {count(nodes, 'node')}, started by "
           f"{info.source}")
    if report.layout:
        yield f"  layout     {report.layout.words}"
    yield f"  compared   {', '.join(same)}"
    if report.offsets_seconds:
        worst = max(range(len(reports)), key=lambda rank: abs(report.offsets_seconds[rank]))
        yield f"  clocks     at most {1e3 * abs(report.offsets_seconds[worst]):.2f} ms from rank 0's (rank {worst})"
    for name, key in FREE.items():
        known = [(rank[key], rank["rank"], rank["node"]) for rank in reports if rank[key] is not None]
        if known:
            least, number, node = min(known)
            yield f"  {name:<10} {least / 2**30:.1f} GiB free at least (rank {number} on {node})"
    yield from _table(report)
    if not report.findings:
        yield "all well"
        return
    yield count(len(report.findings), "problem")
    for number, finding in enumerate(report.findings[:MAX_SHOWN], 1):
        yield f"{number:3}. rank {finding.rank} on {finding.node}: {finding.text}"
    if len(report.findings) > MAX_SHOWN:
        yield f"     and {len(report.findings) - MAX_SHOWN} more, see --json"


def _table(report: "Report") -> Iterator[str]:
    """Bus bandwidths: a row for each collective, a column for each axis."""
    if not report.speeds:
        return
    axes = {speed.axis: speed.axis_ranks for speed in report.speeds}
    found = {(speed.operation, speed.axis): speed for speed in report.speeds}
    yield f"  bus bandwidth of the slowest rank in GB/s, {report.speeds[0].num_bytes / 2**20:g} MiB (middle rank)"
    yield "  " + " " * 16 + "".join(f"{f'{axis} ({ranks})':>24}" for axis, ranks in axes.items())
    for operation in dict.fromkeys(speed.operation for speed in report.speeds):
        cells = [found[operation, axis] for axis in axes]
        yield f"  {operation:<16}" + "".join(f"{f'{c.slowest / 1e9:.3f} ({c.median / 1e9:.3f})':>24}" for c in cells)
