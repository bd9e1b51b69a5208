"""The training loop, readable from top to bottom. One call a rank: `train(config, rank_info, quiet)`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from common.errors import NodeSuspected, RendezvousError, UserError
from common.files import writing
from data_pipeline.folder.manifest import TOKENIZER_FILE
from parallel.layout import Layout
from parallel.process_groups import Groups, build_groups, destroy_groups
from parallel.ranks.rank_info import RankInfo
from parallel.ranks.rendezvous import join, leave
from pretrain.checkpoint.locate import checkpoints_at
from pretrain.checkpoint.reader import Checkpoint, StartWeights
from pretrain.checkpoint.start_weights import start_folder
from pretrain.checkpoint.store import newest_whole, open_whole, save
from pretrain.config.run_config import RunConfig
from pretrain.training.attempt import Attempt
from pretrain.training.build_engine import build_engine
from pretrain.training.devices import choose_device
from pretrain.training.hooks import Hooks, standard_hooks
from pretrain.training.resume import check_same_run, manifest_fields
from pretrain.training.run import MODEL, Run, RunProgress
from pretrain.training.stop_signals import request_name
from pretrain.training.tasks.pretrain import PretrainTask
from pretrain.training.tasks.task import Task
from pretrain.training.third_party_output import ThirdPartyOutput


def train(config: RunConfig, info: RankInfo, quiet: ThirdPartyOutput | None = None) -> int:
    """Join the other ranks, train to `run.steps`, leave in order. Returns the exit code.

    Raises:
        TrainyardError: something outside the config must change (devices, a damaged or foreign run folder, storage).
    """
    device, device_name = choose_device(config, info)
    folder = Path(config.run.dir)
    with Attempt(folder, info) as attempt, _world(info):
        groups = build_groups(Layout.of(config.parallel, info.world_size))
        run = Run(config=config, layout=groups.layout, rank=info.rank, world_size=info.world_size, folder=folder,
                  device_name=device_name, node=info.node)
        hooks = standard_hooks(config, quiet)
        try:
            return _run(run, groups, device, hooks, attempt=attempt, quiet=quiet)
        except BaseException as error:
            hooks.on_end(run, f"stopped by {type(error).__name__}")
            raise


@contextmanager
def _world(info: RankInfo) -> Iterator[None]:
    """Among the other ranks; left in order, so that the process ends without an abort."""
    try:
        join(info)
    except RendezvousError as error:
        if error.node:
            raise NodeSuspected(str(error), None, error.node) from None
        raise
    try:
        yield
    finally:
        destroy_groups()
        leave()


def _run(run: Run, groups: Groups, device: torch.device, hooks: Hooks, *, attempt: Attempt,
         quiet: ThirdPartyOutput | None) -> int:
    config = run.config
    checkpoint = _find_checkpoint(run)
    if checkpoint:
        check_same_run(config, checkpoint.manifest, checkpoint.folder)
        run.start_step = checkpoint.manifest["step"]
    if run.is_main:
        with writing(run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
            config.save(run.folder / "config.yaml")
    source = checkpoint or _start_weights(config.checkpoint.start_from)
    engine = build_engine(config, groups, device, source)
    adam_step = source.adam_step if source else 0
    if source:
        source.close()
    run.engines = {MODEL: engine}
    if quiet:
        quiet.release()
    task = PretrainTask(run, engine.needs_data, groups.coordinates, checkpoint.manifest if checkpoint else {})
    attempt.begin(run.start_step, checkpoint.folder if checkpoint else None)
    hooks.on_start(run)
    progress = RunProgress(run.start_step, adam_step, run.total_steps)
    _train_steps(run, task, progress, hooks, attempt=attempt)
    task.close()
    # First of all: a hook may draw for a while, and the time limit may be near.
    code = attempt.stopped(progress.request) if progress.is_interrupted else attempt.done()
    saved = "no time was left to save" if attempt.is_too_late else "saved"
    hooks.on_end(run, f"{request_name(progress.request)}; {saved}, and goes on when started again"
                 if progress.is_interrupted else "done")
    for engine in run.engines.values():
        engine.close()
    return code


def _train_steps(run: Run, task: Task, progress: RunProgress, hooks: Hooks, *, attempt: Attempt) -> None:
    """Every step up to the last one, or up to the one at which all ranks agree to stop."""
    log, checkpoint = run.config.log, run.config.checkpoint
    if progress.step == 0:
        _evaluate(run, task, hooks, step=0)
    while not progress.is_last and not progress.is_interrupted:
        record = task.step(run.engines, progress.step + 1)
        progress.advance(was_skipped=record.get("skipped", False))
        hooks.on_step_end(run, record)
        progress.request = attempt.step_done(progress.step)
        if progress.is_interrupted and attempt.no_time_to_save():
            return
        if progress.is_evaluation_due(log.evaluate_every):
            _evaluate(run, task, hooks, progress.step)
        if progress.is_checkpoint_due(checkpoint.every):
            _save(run, task, progress, hooks, attempt=attempt)


def _find_checkpoint(run: Run) -> Checkpoint | None:
    """The newest whole checkpoint of the run folder, on every rank the same."""
    if run.config.checkpoint.resume == "never":
        if existing := checkpoints_at(run.checkpoints):
            newest = existing[0].name
            raise UserError(f"checkpoint.resume=never, and {run.checkpoints} holds {newest}: "
                            "choose a new run.dir, or set checkpoint.resume=auto to continue")
        return None
    checkpoint, _ = newest_whole(run.checkpoints)
    if checkpoint and checkpoint.manifest.get("weights_only"):
        raise UserError(f"{checkpoint.folder} holds weights and no state of an optimizer, so no run goes on there: "
                        f"choose another run.dir, and set checkpoint.start_from={run.folder}")
    return checkpoint


def _start_weights(path: str | None) -> StartWeights | None:
    """The weights that a new run starts with, None where they are drawn; called by every rank together."""
    if path is None:
        return None
    folder = start_folder(path)
    if folder is None:
        raise UserError(f"checkpoint.start_from={path}: no checkpoint is there any more")
    return StartWeights(open_whole(folder))


def _evaluate(run: Run, task: Task, hooks: Hooks, step: int) -> None:
    record = task.evaluate(run.engines, step)
    if record is not None:
        hooks.on_evaluation(run, record)


def _save(run: Run, task: Task, progress: RunProgress, hooks: Hooks, *, attempt: Attempt) -> None:
    """Write a checkpoint of the engine that the run is about."""
    started = time.perf_counter()
    fields = {**manifest_fields(run.config, run.world_size, progress.adam_step), **task.state(progress.step)}
    tokenizer = Path(run.config.data.train) / TOKENIZER_FILE
    path = save(run.checkpoints, progress.step, run.engines[MODEL].owned_fragments(), fields,
                keep=run.config.checkpoint.keep, companions=[tokenizer])
    hooks.on_checkpoint(run, path, progress.step)
    attempt.saved(path, progress.step, time.perf_counter() - started)
