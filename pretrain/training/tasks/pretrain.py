"""Pretraining: one model, one objective, batches in the order of the run's seed, a held-out loss."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from common.errors import ExitCode, UserError
from data_pipeline.corruption.noise_seed import HELDOUT, NoiseSeed
from data_pipeline.loader import Loader, heldout_batches
from parallel.engine import NotFinite
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
        DataError: the set is damaged, of another kind, or smaller than one sample.
    """

    def __init__(self, config: RunConfig, data_rank: int, data_size: int):
        self.config, self.data_rank, self.data_size = config, data_rank, data_size
        self.dataset = open_dataset(config, config.data.heldout)
        self.stages = make_stages(config.objective, config.model, self.dataset, HELDOUT)

    def __len__(self) -> int:
        """The same on every data rank."""
        num_samples = min(self.config.log.evaluate_samples, self._per_epoch)
        return math.ceil(num_samples / (self.config.parallel.micro_batch * self.data_size))

    def __iter__(self) -> Iterator[Batch]:
        config = self.config
        return heldout_batches(self.dataset, config.window_tokens, config.parallel.micro_batch,
                               config.log.evaluate_samples, data_rank=self.data_rank, data_size=self.data_size,
                               stages=self.stages)

    @cached_property
    def _per_epoch(self) -> int:
        return self.dataset.samples(self.config.window_tokens, seed=None).per_epoch


class PretrainTask:
    """The loader, the learning rate, the engine's step and its record."""

    def __init__(self, run: Run, reads_data: bool, at: Coordinates, position: int):
        """
        Args:
            reads_data: whether this rank's stage takes batches.
            position: samples consumed before, as saved in a checkpoint.
        """
        self.run, self.reads_data, self.at = run, reads_data, at
        self.loader = self._open_loader(position) if reads_data else None

    def _open_loader(self, position: int) -> Loader:
        config = self.run.config
        dataset = open_dataset(config, config.data.train)
        stages = make_stages(config.objective, config.model, dataset, NoiseSeed(config.run.seed))
        return Loader(dataset, config.window_tokens, config.run.seed, config.parallel.global_batch,
                      config.parallel.micro_batch, data_rank=self.at.dp, data_size=self.run.layout.data,
                      workers=config.data.workers, start_position=position, stages=stages,
                      max_bad_fraction=config.data.max_bad_fraction)

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
            run.unit: step * run.tokens_per_step, "step_seconds": seconds,
            f"{run.unit}_per_second": throughput(run.tokens_per_step, seconds),
        }
        if config.spec.reads == "pairs":  # each data rank has counted its own, and all its tensor ranks the same
            record["bad_samples"] = sum_over_ranks(self.loader.num_bad) // run.layout.tensor
        if result.routing:
            record.update(result.routing)
        if result.skipped:
            record["skipped"] = True
        flops = config.spec.flops_per_token(config.model, config.window_tokens)
        used = mfu(flops, record[f"{run.unit}_per_second"], run.device_name, run.world_size, config.precision.compute)
        return record if used is None else {**record, "mfu": used}

    def evaluate(self, engines: Engines, step: int) -> Record | None:
        """The held-out loss, where the config names a held-out set."""
        config = self.run.config
        if not config.data.heldout or not config.log.evaluate_every:
            return None
        losses = engines[MODEL].evaluate(self._heldout if self.reads_data else None)
        return {"step": step, self.run.unit: step * self.run.tokens_per_step, **loss_fields("heldout_loss", losses)}

    @cached_property
    def _heldout(self) -> HeldoutBatches:
        return HeldoutBatches(self.run.config, self.at.dp, self.run.layout.data)

    def state(self, step: int) -> dict[str, Any]:
        """The position in the order of the data."""
        return {"position_samples": step * self.run.config.parallel.global_batch}

    def close(self) -> None:
        """End the loader's processes."""
        if self.loader:
            self.loader.close()
