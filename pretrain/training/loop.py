"""The training loop, readable from top to bottom. One call a rank: `train(config, rank_info, quiet)`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import DataError, ExitCode, NodeSuspected, UserError
from data_pipeline.folder.manifest import TOKENIZER_FILE
from data_pipeline.loader import Loader, heldout_batches
from parallel.engine import Engine
from parallel.layout import Layout
from parallel.process_groups import Groups, build_groups, destroy_groups
from parallel.ranks.agreement import sum_over_ranks
from parallel.ranks.rank_info import RankInfo
from parallel.ranks.rendezvous import RendezvousError, join, leave
from parallel.zero.step_hooks import NotFinite
from pretrain.checkpoint.manifest import CheckpointError, published
from pretrain.checkpoint.start_weights import start_folder
from pretrain.checkpoint.store import Checkpoint, StorageError, newest_whole, open_whole, save, starting_weights
from pretrain.config.run_config import RunConfig
from pretrain.objectives import HELDOUT_SEED, make_stages
from pretrain.training.attempt import Attempt
from pretrain.training.build_engine import build_engine
from pretrain.training.datasets import open_dataset
from pretrain.training.devices import choose_device
from pretrain.training.hooks import Hooks, standard_hooks
from pretrain.training.metrics import mfu, throughput
from pretrain.training.optim import learning_rate
from pretrain.training.resume import check_same_run, facts_of
from pretrain.training.stop_signals import request_name
from pretrain.training.third_party_output import ThirdPartyOutput


@dataclass
class Run:
    """What hooks may read of a run."""

    config: RunConfig
    layout: Layout
    rank: int
    world_size: int
    folder: Path
    device_name: str
    node: str
    start_step: int = 0
    engine: Engine | None = None  # built after the run folder has been looked at

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def total_steps(self) -> int:
        return self.config.run.steps

    @property
    def num_parameters(self) -> int:
        return self.config.spec.parameter_count(self.config.model)

    @property
    def num_active_parameters(self) -> int:
        return self.num_parameters - self.config.spec.idle_parameter_count(self.config.model)

    @property
    def tokens_per_step(self) -> int:
        samples = self.config.parallel.global_batch
        return samples * self.config.window_tokens if self.unit == "tokens" else samples

    @property
    def unit(self) -> str:
        """What progress is counted in: tokens, or samples."""
        return self.config.spec.unit

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def train(config: RunConfig, info: RankInfo, quiet: ThirdPartyOutput | None = None) -> int:
    """Join the other ranks, train to `run.steps`, leave in order. Returns the exit code.

    Raises:
        UserError: something outside the config must change (devices, a damaged or foreign run folder, storage).
    """
    device, device_name = choose_device(config, info)
    folder = Path(config.run.dir)
    try:
        with Attempt(folder, info) as attempt, _world(info):
            groups = build_groups(Layout.of(config.parallel, info.world_size))
            run = Run(config, groups.layout, info.rank, info.world_size, folder, device_name, info.node)
            hooks = standard_hooks(config, quiet)
            try:
                return _run(run, groups, device, hooks, attempt, quiet)
            except BaseException as error:
                hooks.on_end(run, f"stopped by {type(error).__name__}")
                raise
    except (CheckpointError, DataError) as error:
        raise UserError(str(error), ExitCode.DATA) from None
    except StorageError as error:
        raise UserError(str(error), ExitCode.STORAGE) from None


@contextmanager
def _world(info: RankInfo) -> Iterator[None]:
    """Among the other ranks; left in order, so that the process ends without an abort."""
    try:
        join(info)
    except RendezvousError as error:
        if error.node:
            raise NodeSuspected(str(error), None, error.node) from None
        raise UserError(str(error), ExitCode.USER if error.is_mistake else ExitCode.INTERNAL) from None
    try:
        yield
    finally:
        destroy_groups()
        leave()


def _run(run: Run, groups: Groups, device: torch.device, hooks: Hooks, attempt: Attempt,
         quiet: ThirdPartyOutput | None) -> int:
    config = run.config
    checkpoint = _find_checkpoint(run)
    if checkpoint:
        check_same_run(config, checkpoint.manifest, checkpoint.folder)
        run.start_step = checkpoint.manifest["step"]
    if run.is_main:
        run.folder.mkdir(parents=True, exist_ok=True)
        config.save(run.folder / "config.yaml")
    engine = run.engine = build_engine(config, groups, device)
    adam_step = 0
    if checkpoint:
        adam_step = checkpoint.manifest["adam_step"]
        engine.fill(lambda name, kind, shape: checkpoint.tensor(name, kind), adam_step)
    elif config.checkpoint.start_from:
        engine.fill(starting_weights(_start(config.checkpoint.start_from)))
    if quiet:
        quiet.release()
    loader = _open_loader(run, engine, checkpoint)
    attempt.begin(run.start_step, checkpoint.folder if checkpoint else None)
    hooks.on_start(run)
    if run.start_step == 0:
        _evaluate(run, engine, hooks, step=0)
    request = 0
    for step in range(run.start_step + 1, run.total_steps + 1):
        record = _step(run, engine, loader, step)
        adam_step += not record.get("skipped", False)
        hooks.on_step_end(run, record)
        request = attempt.step_done(step)
        last = step == run.total_steps
        if request and not last and attempt.no_time_to_save():
            break
        if last or (config.log.evaluate_every and step % config.log.evaluate_every == 0 and not request):
            _evaluate(run, engine, hooks, step)
        if request or (config.checkpoint.every and (last or step % config.checkpoint.every == 0)):
            started = time.perf_counter()
            path = _save(run, engine, hooks, step, adam_step)
            attempt.saved(path, step, time.perf_counter() - started)
        if request and not last:
            break
    if loader:
        loader.close()
    stopped = request and attempt.last_step < run.total_steps
    # First of all: a hook may draw for a while, and the time limit may be near.
    code = attempt.stopped(request) if stopped else attempt.done()
    saved = "no time was left to save" if attempt.is_too_late else "saved"
    hooks.on_end(run, f"{request_name(request)}; {saved}, and goes on when started again" if stopped else "done")
    engine.close()
    return code


def _find_checkpoint(run: Run) -> Checkpoint | None:
    """The newest whole checkpoint of the run folder, on every rank the same."""
    if run.config.checkpoint.resume == "never":
        if published(run.checkpoints):
            newest = published(run.checkpoints)[0].name
            raise UserError(f"checkpoint.resume=never, and {run.checkpoints} holds {newest}: "
                            "choose a new run.dir, or set checkpoint.resume=auto to continue")
        return None
    checkpoint, _ = newest_whole(run.checkpoints)
    if checkpoint and checkpoint.manifest.get("weights_only"):
        raise UserError(f"{checkpoint.folder} holds weights and no state of an optimizer, so no run goes on there: "
                        f"choose another run.dir, and set checkpoint.start_from={run.folder}")
    return checkpoint


def _start(path: str) -> Checkpoint:
    """The checkpoint that a new run starts with; called by every rank together."""
    folder = start_folder(path)
    if folder is None:
        raise UserError(f"checkpoint.start_from={path}: no checkpoint is there any more")
    return open_whole(folder)


def _open_loader(run: Run, engine: Engine, checkpoint: Checkpoint | None) -> Loader | None:
    """The training batches of this rank from the saved position on; None on stages that read none."""
    if not engine.needs_data:
        return None
    config, at = run.config, engine.groups.coordinates
    dataset = open_dataset(config, config.data.train)
    return Loader(dataset, config.window_tokens, config.run.seed, config.parallel.global_batch,
                  config.parallel.micro_batch, at.dp, run.layout.data, config.data.workers,
                  checkpoint.manifest["position_samples"] if checkpoint else 0,
                  make_stages(config.objective, config.model, dataset, config.run.seed), config.data.max_bad_fraction)


def _step(run: Run, engine: Engine, loader: Loader | None, step: int) -> dict[str, Any]:
    """One optimizer step and its line in metrics.jsonl."""
    config = run.config
    rate = learning_rate(config.schedule, config.optimizer, step, run.total_steps)
    started = time.perf_counter()
    try:
        result = engine.train_step(next(loader) if loader else None, step, rate)
    except NotFinite as error:
        raise UserError(f"step {step}: {error}. No weight was changed in this step. Go on from the last checkpoint in "
                        f"{run.checkpoints} with a lower optimizer.lr or a longer schedule.warmup_steps.",
                        ExitCode.INTERNAL) from None
    seconds = time.perf_counter() - started
    record = {
        "step": step, "loss": result.loss, "grad_norm": result.grad_norm, "lr": rate,
        run.unit: step * run.tokens_per_step, "step_seconds": seconds,
        f"{run.unit}_per_second": throughput(run.tokens_per_step, seconds),
    }
    if config.spec.reads == "pairs":  # each data rank has counted its own, and all its tensor ranks the same
        record["bad_samples"] = sum_over_ranks(loader.num_bad) // run.layout.tensor
    if result.routing:
        record.update(result.routing)
    if result.skipped:
        record["skipped"] = True
    flops = config.spec.flops_per_token(config.model, config.window_tokens)
    used = mfu(flops, record[f"{run.unit}_per_second"], run.device_name, run.world_size, config.precision.compute)
    return record if used is None else {**record, "mfu": used}


def _evaluate(run: Run, engine: Engine, hooks: Hooks, step: int) -> None:
    """Held-out loss, where the config names a held-out set."""
    config = run.config
    if not config.data.heldout or not config.log.evaluate_every:
        return
    batches = None
    if engine.needs_data:
        dataset = open_dataset(config, config.data.heldout)
        stages = make_stages(config.objective, config.model, dataset, HELDOUT_SEED)
        batches = list(heldout_batches(dataset, config.window_tokens, config.parallel.micro_batch,
                                       config.log.evaluate_samples, engine.groups.coordinates.dp, run.layout.data,
                                       stages))
    total, count = engine.evaluate(batches)
    hooks.on_evaluation(run, {"step": step, run.unit: step * run.tokens_per_step, "heldout_loss": total / count})


def _save(run: Run, engine: Engine, hooks: Hooks, step: int, adam_step: int) -> Path:
    position = step * run.config.parallel.global_batch
    facts = facts_of(run.config, run.world_size, step, position, adam_step)
    tokenizer = Path(run.config.data.train) / TOKENIZER_FILE
    path = save(run.checkpoints, step, engine.owned_fragments(), facts, run.config.checkpoint.keep, [tokenizer])
    hooks.on_checkpoint(run, path, step)
    return path
