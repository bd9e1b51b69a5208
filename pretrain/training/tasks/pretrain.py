"""Pretraining: one model, one objective, batches in the order of the run's seed, a held-out loss."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from common.errors import ExitCode, NotFinite, UserError
from data_pipeline.batch_plan import BatchPlan
from data_pipeline.corruption.noise_seed import HELDOUT, NoiseSeed
from data_pipeline.loader import Loader, ReadOptions, heldout_batches
from parallel.layout import Coordinates
from parallel.objective import Batch
from parallel.ranks.agreement import sum_over_ranks
from pretrain.config.run_config import RunConfig
from pretrain.objectives import make_stages
from pretrain.training.datasets import open_dataset
from pretrain.training.metrics import Record, loss_fields, mfu, throughput
from pretrain.training.optim import learning_rate
from pretrain.training.run import MODEL, Run
from pretrain.training.tasks.task import Engines


class HeldoutBatches:
    """This rank's micro-batches of the held-out set, read anew each time it is iterated; the dataset is opened once.

    Raises:
        DataError: the set is damaged.
        UserError: it is of another kind, or smaller than one sample.
    """

    def __init__(self, config: RunConfig, data_rank: int, data_ranks: int):
        if config.data.heldout is None:
            raise ValueError("the config names no held-out set")
        self.dataset = open_dataset(config, config.data.heldout)
        self.num_samples = config.log.evaluate_samples
        self.plan = BatchPlan.heldout(config.parallel.micro_batch, data_rank, data_ranks)
        self.read = ReadOptions(config.window_tokens,
                                stages=make_stages(config.objective, config.model, self.dataset, HELDOUT))

    def __len__(self) -> int:
        """The same on every data rank."""
        num_samples = min(self.num_samples, self._samples_per_epoch)
        return self.plan.num_steps(num_samples) * self.plan.micro_batches_per_step

    def __iter__(self) -> Iterator[Batch]:
        return heldout_batches(self.dataset, self.plan, self.read, self.num_samples)

    @cached_property
    def _samples_per_epoch(self) -> int:
        return self.dataset.samples(self.read.sequence_length, seed=None).per_epoch


class PretrainTask:
    """The loader, the learning rate, the engine's step and its record."""

    def __init__(self, run: Run, reads_data: bool, at: Coordinates, position: int):
        """
        Args:
            reads_data: whether this rank's stage takes batches.
            position: samples consumed before, as saved in a checkpoint.
        """
        config = run.config
        self.run, self.reads_data = run, reads_data
        self.plan = BatchPlan(seed=config.run.seed, global_batch=config.parallel.global_batch,
                              micro_batch=config.parallel.micro_batch, data_rank=at.dp, data_ranks=run.layout.data,
                              first_position=position)
        self.loader = self._open_loader() if reads_data else None

    def _open_loader(self) -> Loader:
        config = self.run.config
        dataset = open_dataset(config, config.data.train)
        stages = make_stages(config.objective, config.model, dataset, NoiseSeed(config.run.seed))
        return Loader(dataset, self.plan, ReadOptions(config.window_tokens, stages=stages, workers=config.data.workers,
                                                      max_bad_fraction=config.data.max_bad_fraction))

    def _position_after(self, step: int) -> int:
        """Samples that the whole run has consumed when `step` is done."""
        return self.plan.position_after(step - self.run.start_step)

    def step(self, engines: Engines, step: int) -> Record:
        """Raises UserError for a gradient that is not finite, DataError for damaged data."""
        run, config = self.run, self.run.config
        rate = learning_rate(config.schedule, config.optimizer, step, run.total_steps)
        started = time.perf_counter()
        try:
            result = engines[MODEL].train_step(next(self.loader) if self.loader else None, step, rate)
        except NotFinite as error:
            raise UserError(f"step {step}: {error}. No weight was changed in this step. Go on from the last checkpoint "
                            f"in {run.checkpoints} with a lower optimizer.lr or a longer schedule.warmup_steps.",
                            ExitCode.INTERNAL) from None
        seconds = time.perf_counter() - started
        record = {
            "step": step, **loss_fields("loss", result.losses), "grad_norm": result.grad_norm, "lr": rate,
            run.unit: self._position_after(step) * run.units_per_sample, "step_seconds": seconds,
            f"{run.unit}_per_second": throughput(run.tokens_per_step, seconds),
        }
        if config.spec.reads == "pairs":  # each data rank has counted its own, and all its tensor ranks the same
            record["bad_samples"] = sum_over_ranks(self.loader.num_bad if self.loader else 0) // run.layout.tensor
        if result.routing:
            record.update(result.routing)
        if result.skipped:
            record["skipped"] = True
        flops = config.spec.flops_per_unit(config.model, config.window_tokens, config.num_predictions)
        used = mfu(flops, record[f"{run.unit}_per_second"], run.device_name, run.world_size,
                   dtype=config.precision.compute)
        return record if used is None else {**record, "mfu": used}

    def evaluate(self, engines: Engines, step: int) -> Record | None:
        """The held-out loss, where the config names a held-out set."""
        config = self.run.config
        if not config.data.heldout or not config.log.evaluate_every:
            return None
        losses = engines[MODEL].evaluate(self._heldout if self.reads_data else None)
        return {"step": step, self.run.unit: self._position_after(step) * self.run.units_per_sample,
                **loss_fields("heldout_loss", losses)}

    @cached_property
    def _heldout(self) -> HeldoutBatches:
        return HeldoutBatches(self.run.config, self.plan.data_rank, self.plan.data_ranks)

    def state(self, step: int) -> dict[str, Any]:
        """The position in the order of the data."""
        return {"position_samples": self._position_after(step)}

    def close(self) -> None:
        """End the loader's processes."""
        if self.loader:
            self.loader.close()
