"""Whether the ranks that a launcher started could train together: what they see, say to each other, and how fast."""

from __future__ import annotations

import json
import statistics
import time
import uuid
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.errors import ConfigError, ExitCode, NodeSuspected, RendezvousError, UserError
from parallel.checks.collective_check import Measured, measure
from parallel.layout import Layout
from parallel.process_groups import build_groups, destroy_groups
from parallel.ranks.agreement import Progress, all_gather_text
from parallel.ranks.rank_info import RankInfo
from parallel.ranks.rendezvous import join, leave
from pretrain.config.run_config import RunConfig
from pretrain.selfcheck.rank_report import Finding, SharedToken, breaks_groups, differing, report_of_rank, skewed
from pretrain.training.devices import local_device

ROUND_TRIPS = 5


@dataclass(frozen=True)
class Speed:
    """One collective on one axis: the slowest rank's bus bandwidth and the middle one's, in bytes per second."""

    axis: str
    operation: str
    axis_ranks: int
    num_bytes: int
    _: KW_ONLY
    slowest: float
    slowest_rank: int
    median: float


@dataclass(frozen=True)
class Report:
    """What was found, the same on every rank. `reports` and `offsets_seconds` are by rank."""

    info: RankInfo
    layout: Layout | None
    reports: list[dict[str, Any]]
    _: KW_ONLY
    offsets_seconds: list[float] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.NODE if self.findings else ExitCode.DONE

    def as_json(self) -> str:
        offsets: Sequence[float | None] = self.offsets_seconds or [None] * len(self.reports)
        ranks = [{**report, "clock_offset_seconds": offset}
                 for report, offset in zip(self.reports, offsets, strict=True)]
        return json.dumps({
            "ok": not self.findings, "world_size": self.info.world_size, "launcher": self.info.source,
            "layout": asdict(self.layout) if self.layout else None, "ranks": ranks,
            "bytes_per_second": [asdict(speed) for speed in self.speeds],
            "findings": [finding._asdict() for finding in self.findings],
        }, indent=1)  # fmt: skip


def check(info: RankInfo, config: RunConfig | None, config_error: ConfigError | None, node_problems: list[str], *,
          num_bytes: int, timeout_seconds: float) -> Report:
    """One rank's part; every rank returns the same report.

    Args:
        config_error: why this rank has no config though one was named.
        num_bytes: size of the buffer of a collective.
        timeout_seconds: how long a rank waits for another, anywhere.

    Raises:
        UserError, ConfigError: a mistake that all ranks share.
        NodeSuspected: a rank did not come, died or hangs; the message names it as far as can be told.
    """
    try:
        join(info, timeout_seconds, timeout_seconds)
    except RendezvousError as error:
        raise NodeSuspected(error.message, node=error.node) from None
    progress = Progress()
    try:
        return _check(info, config, config_error, node_problems, num_bytes=num_bytes, timeout_seconds=timeout_seconds,
                      progress=progress)
    except RuntimeError as error:  # what torch.distributed raises for a connection that is lost or too slow
        raise _hang(error, progress, info) from None
    finally:
        destroy_groups()
        leave()


def _check(info: RankInfo, config: RunConfig | None, config_error: ConfigError | None, node_problems: list[str], *,
           num_bytes: int, timeout_seconds: float, progress: Progress) -> Report:
    progress.begin("the comparison of what ranks see")
    device, reports = _tell(info, config, config_error, node_problems)
    findings = differing(reports)
    alike = not breaks_groups(reports)  # the same on all ranks, so that they go on together
    if config and alike:
        progress.begin("the file in the run folder")
        findings += _shared_folder(info, config, reports)
    progress.begin("the comparison of clocks")
    offsets = _clock_offsets(info)
    findings += skewed(reports, offsets)
    if not alike:
        return Report(info, None, reports, offsets_seconds=offsets, findings=findings)
    layout = Layout.of(config.parallel, info.world_size) if config else Layout(data=info.world_size)
    progress.begin("the groups of the layout")
    groups = build_groups(layout, timeout_seconds)
    mine = list(measure(groups, device, num_bytes, progress.begin))
    progress.begin("the comparison of results")
    by_rank = [[Measured(*entry) for entry in json.loads(text)] for text in all_gather_text(json.dumps(mine))]
    findings += [Finding(rank, reports[rank]["node"], f"{seen.operation} over {seen.axis} (ranks "
                         f"{', '.join(map(str, seen.ranks))}) brought it a wrong answer")
                 for rank, entries in enumerate(by_rank) for seen in entries if not seen.right]
    return Report(info, layout, reports, offsets_seconds=offsets, speeds=_speeds(by_rank), findings=findings)


def _tell(info: RankInfo, config: RunConfig | None, config_error: ConfigError | None, node_problems: list[str]
          ) -> tuple[torch.device, list[dict[str, Any]]]:
    """This rank's device, and what every rank sees. Raises what is wrong for all of them alike."""
    device, device_name, mistake, first = torch.device("cpu"), "cpu", None, None
    try:
        device, device_name = local_device(info)
    except UserError as error:
        mistake = str(error)
    if config_error:
        first = f"refused ({config_error.problems[0].where}: {config_error.problems[0].asked})"
    own = report_of_rank(info, config, first, device, device_name=device_name, node_problems=node_problems)
    own |= {"mistake": mistake, "refused": bool(first)}
    told = [json.loads(text) for text in all_gather_text(json.dumps(own))]
    mistakes = [report.pop("mistake") for report in told]
    if any(mistakes):
        raise UserError(next(text for text in mistakes if text))
    refused = [report.pop("refused") for report in told]
    if all(refused):
        raise config_error if config_error and info.rank == 0 else UserError(f"rank {info.rank}: the config is {first}")
    return device, told


def _shared_folder(info: RankInfo, config: RunConfig, reports: list[dict[str, Any]]) -> list[Finding]:
    """Which ranks do not see what rank 0 writes into the run folder."""
    token = all_gather_text(uuid.uuid4().hex)[0]
    with SharedToken(Path(config.run.dir), token, info.rank == 0) as shared:
        all_gather_text("written")
        problems = all_gather_text(shared.problem() or "")
    return [Finding(rank, reports[rank]["node"], text) for rank, text in enumerate(problems) if text]


def _clock_offsets(info: RankInfo) -> list[float]:
    """By rank, seconds that its clock is ahead of rank 0's: the best of a few round trips, one rank after the other."""
    own, clock = 0.0, torch.zeros((), dtype=torch.float64)
    for rank in range(1, info.world_size):
        best = float("inf")
        for _ in range(ROUND_TRIPS):  # rank 0 with one other at a time, on the CPU, so gloo carries it
            if info.rank == 0:
                asked = time.time()
                dist.send(clock, rank)
                dist.recv(clock, rank)
                answered = time.time()
                if answered - asked < best:
                    best, offset = answered - asked, float(clock) - (asked + answered) / 2
            elif info.rank == rank:
                dist.recv(clock, 0)
                dist.send(clock.fill_(time.time()), 0)
        if info.rank == 0:
            dist.send(clock.fill_(offset), rank)
        elif info.rank == rank:
            dist.recv(clock, 0)
            own = float(clock)
    return [float(text) for text in all_gather_text(repr(own))]


def _speeds(by_rank: list[list[Measured]]) -> list[Speed]:
    found: dict[tuple[str, str], list[tuple[float, int, Measured]]] = {}
    for rank, measured in enumerate(by_rank):
        for seen in measured:
            key = (seen.axis, seen.operation)
            found.setdefault(key, []).append((seen.link_bytes_per_second, rank, seen))
    speeds = []
    for (axis, operation), entries in found.items():
        (slowest, slowest_rank, _), any_of_them = min(entries), entries[0][2]
        speeds.append(Speed(axis, operation, len(any_of_them.ranks), any_of_them.num_bytes, slowest=slowest,
                            slowest_rank=slowest_rank, median=statistics.median(speed for speed, _, _ in entries)))
    return speeds


def _hang(error: RuntimeError, progress: Progress, info: RankInfo) -> NodeSuspected:
    """Who is to be suspected when a collective failed: the ranks that have not begun it."""
    late = progress.behind()
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    who = (f"not begun by {'rank' if len(late) == 1 else 'ranks'} {', '.join(map(str, late))}, which hangs or died"
           if late else "begun by every rank, so a connection between them may be bad")
    return NodeSuspected(f"rank {info.rank} on {info.node} could not finish {progress.what}, {who}: {said}",
                         late[0] if len(late) == 1 else None, None)
