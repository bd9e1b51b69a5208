"""Pretraining: one model, one objective, batches in the order of the run's seed, a held-out loss."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from common.errors import DataError, ExitCode, NotFinite, UserError
from data_pipeline.batch_plan import BatchPlan
from data_pipeline.corruption.noise_seed import HELDOUT, NoiseSeed
from data_pipeline.loader import Loader, ReadOptions, heldout_batches
from data_pipeline.unusable import Unusable, is_too_many, told
from parallel.layout import Coordinates
from parallel.objective import Batch
from parallel.ranks.agreement import all_gather_text, sum_over_ranks
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
        self.unusable = Unusable("gave no weight in evaluation to")  # of the last iteration, on this data rank

    def __len__(self) -> int:
        """The same on every data rank."""
        return self.plan.num_steps(self.num_samples_read) * self.plan.micro_batches_per_step

    def __iter__(self) -> Iterator[Batch]:
        self.unusable.restart()
        return heldout_batches(self.dataset, self.plan, self.read, self.num_samples, unusable=self.unusable)

    @cached_property
    def num_samples_read(self) -> int:
        """Samples over all ranks, with those that cannot be used."""
        return min(self.num_samples, self.dataset.samples(self.read.sequence_length, seed=None).per_epoch)


class PretrainTask:
    """The loader, the learning rate, the engine's step and its record."""

    def __init__(self, run: Run, reads_data: bool, at: Coordinates, state: Mapping[str, Any]):
        """
        Args:
            reads_data: whether this rank's stage takes batches.
            state: the manifest of the checkpoint that the run goes on from, with what `state` gave; empty for none.
        """
        config, position = run.config, state["position_samples"] if state else 0
        self.run, self.reads_data = run, reads_data
        self.num_unusable = self._num_unusable_before = state.get("unusable_samples", 0)
        self._counts_samples = at.tp == at.cp == at.pp == 0  # one rank for each data rank
        self.plan = BatchPlan(seed=config.run.seed, global_batch=config.parallel.global_batch,
                              micro_batch=config.parallel.micro_batch, data_rank=at.dp, data_ranks=run.layout.data,
                              first_position=position)
        self.loader = self._open_loader() if reads_data else None

    def _open_loader(self) -> Loader:
        config = self.run.config
        dataset = open_dataset(config, config.data.train)
        stages = make_stages(config.objective, config.model, dataset, NoiseSeed(config.run.seed))
        return Loader(dataset, self.plan, ReadOptions(config.window_tokens, stages=stages, workers=config.data.workers,
                                                      pinned=self.run.engines[MODEL].device.type == "cuda"))

    def _position_after(self, step: int) -> int:
        """Samples that the whole run has consumed when `step` is done."""
        return self.plan.position_after(step - self.run.start_step)

    def step(self, engines: Engines, step: int) -> Record:
        """Raises UserError for a gradient that is not finite, DataError for damaged data or too much unusable data."""
        run, config = self.run, self.run.config
        rate = learning_rate(config.schedule, config.optimizer, step, run.total_steps)
        started = time.perf_counter()
        try:
            batches = next(self.loader) if self.loader else None
            result = engines[MODEL].train_step(batches, step, rate, self.loader.unusable.num if self.loader else 0)
        except NotFinite as error:
            raise UserError(f"step {step}: {error}. No weight was changed in this step. Go on from the last checkpoint "
                            f"in {run.checkpoints} with a lower optimizer.lr or a longer schedule.warmup_steps.",
                            ExitCode.INTERNAL) from None
        seconds = time.perf_counter() - started
        self.num_unusable = self._num_unusable_before + result.tally
        self._check_unusable(step)
        record = {
            "step": step, **loss_fields("loss", result.losses), "grad_norm": result.grad_norm, "lr": rate,
            run.unit: self._position_after(step) * run.units_per_sample, "step_seconds": seconds,
            f"{run.unit}_per_second": throughput(run.tokens_per_step, seconds),
        }
        if config.spec.reads == "pairs":
            record["data/unusable"] = self.num_unusable
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
        record = {"step": step, self.run.unit: self._position_after(step) * self.run.units_per_sample,
                  **loss_fields("heldout_loss", losses)}
        if config.spec.reads != "pairs":
            return record
        own = self._heldout if self._counts_samples else None
        num_unusable = sum_over_ranks(own.unusable.num if own else 0)
        num_samples = sum_over_ranks(own.num_samples_read if own and self.plan.data_rank == 0 else 0)
        if num_unusable == num_samples:
            raise DataError(f"none of the {num_samples:,} samples that evaluation reads of {config.data.heldout} can "
                            f"be used. {told(all_gather_text((own.unusable if own else Unusable()).report()))}")
        return {**record, "data/unusable": num_unusable, "data/samples": num_samples}

    def _check_unusable(self, step: int) -> None:
        """One decision of the run: every rank knows the same numbers. Raises DataError on all of them at one step."""
        data, num_samples = self.run.config.data, self._position_after(step)
        if not is_too_many(self.num_unusable, num_samples, data.max_bad_fraction):
            return
        own = self.loader if self._counts_samples else None
        reports = all_gather_text((own.unusable if own else Unusable()).report())
        raise DataError(
            f"step {step}: {self.num_unusable:,} of the {num_samples:,} samples that the run has read cannot be used "
            f"({self.num_unusable / num_samples:.2%}), and data.max_bad_fraction={data.max_bad_fraction:g} allows "
            f"{f'{data.max_bad_fraction:.2%}' if data.max_bad_fraction else 'none'}. {told(reports)}. "
            f"`trainyard data verify {data.train}` lists all of them; write the dataset again without them, or raise "
            "data.max_bad_fraction"
        )

    @cached_property
    def _heldout(self) -> HeldoutBatches:
        return HeldoutBatches(self.run.config, self.plan.data_rank, self.plan.data_ranks)

    def state(self, step: int) -> dict[str, Any]:
        """The position in the order of the data, and how many samples up to there could not be used."""
        return {"position_samples": self._position_after(step), "unusable_samples": self.num_unusable}

    def close(self) -> None:
        """End the loader's processes."""
        if self.loader:
            self.loader.close()
