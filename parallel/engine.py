"""Applies every kind of parallelism to one list of layers, in one written order, and owns the step.

The order: groups -> cut into stages -> build this stage (sliced over tp; cut over dp at once under ZeRO-3) -> wrap
(compute type, recompute) -> optimizer -> DeepSpeed (ZeRO, pipeline) -> our gradient norm and clipping -> fill weights.
Whatever two libraries have an opinion on has one owner here: the loss weight, the gradient norm, clipping, the learning
rate, initial weights and the state that checkpoints store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.chunked_loss import waiting
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.gradient_cache import TwoPassStep
from parallel.load_balance import Balances
from parallel.loss_terms import Losses, LossTerms
from parallel.objective import Batch, Batches, LossFunction, MicroBatch, Objective
from parallel.parameter_plan import InitialWeights, plan_of
from parallel.pipeline_stages import LayerSpec, Stage, cut
from parallel.precision import DTYPES, CastOnUse
from parallel.process_groups import Groups
from parallel.random_streams import seed_step
from parallel.recompute import recompute_selectively, recomputed
from parallel.tensor_parallel import TensorParallel
from parallel.tensor_slice import OwnedFragment, SliceRange, Source
from parallel.zero.engine import init_distributed, partitioned_construction, settle_tied, start_engine
from parallel.zero.frozen_weights import open_state
from parallel.zero.fused_loss import chunked_cross_entropy
from parallel.zero.host_adam import adamw
from parallel.zero.offload import MappedFiles
from parallel.zero.optimizer_state import KINDS, Slot, set_adam_step
from parallel.zero.placeholders import trained_parameters
from parallel.zero.settings import deepspeed_config
from parallel.zero.step_hooks import StepHooks

FILL_ELEMENTS = 1 << 22  # read from a source at once: 16 MiB


@dataclass(frozen=True)
class StepResult:
    """One step: `losses` are means over the global batch, `grad_norm` is the norm before clipping.

    `routing` is what routers of experts report (`Balances.end_step`); their auxiliary losses are not in `losses`.
    `tally` is the sum over the data ranks of what they gave to `train_step`.
    """

    losses: Losses
    grad_norm: float
    skipped: bool
    routing: dict[str, Any] | None
    _: KW_ONLY
    tally: int = 0

    @property
    def loss(self) -> float:
        """The weighted sum of all terms."""
        return self.losses.loss


class Engine:
    """A model on a layout, ready to step."""

    def __init__(self, build_layers: Callable[[TensorParallel], Sequence[LayerSpec]], objective: Objective,
                 groups: Groups, parallel: ParallelConfig, *, precision: PrecisionConfig, device: torch.device,
                 make_optimizer: Callable[[list, Callable], torch.optim.Optimizer], clip_norm: float, seed: int,
                 source: Source | None = None):
        """
        Args:
            build_layers: the family's layer list, given the tensor axis.
            make_optimizer: from [(global name, parameter)] and the kind of AdamW to the one that DeepSpeed shards.
            clip_norm: largest global gradient norm, 0 for no clipping.
            source: where weights and moments come from; None for weights drawn from `seed`.

        Raises:
            NoRoom: the disk of `parallel.offload_folder` is full.
        """
        self.groups, self.layout, self.objective, self.device = groups, groups.layout, objective, device
        self.seed = seed
        self.is_replicated = parallel.zero_stage == 0
        self.accumulation = parallel.global_batch // (parallel.micro_batch * self.layout.data)
        at = groups.coordinates
        config = deepspeed_config(parallel, precision, self.layout, device.type == "cuda")
        init_distributed(dist.get_backend())

        self.tp = TensorParallel(groups, device)
        self.terms = LossTerms(objective, groups, self.tp, self.accumulation)
        specs = list(build_layers(self.tp))
        self.bounds = cut([spec.cost for spec in specs], parallel.num_stages, [spec.with_next for spec in specs])
        self.v_shaped = parallel.v_shaped
        stages = (at.pp, parallel.num_stages - 1 - at.pp) if self.v_shaped else (at.pp,)
        with partitioned_construction(config, groups):
            stage = Stage(specs, *((self.bounds[number], self.bounds[number + 1]) for number in stages))
        slots = self._make_slots(stage)
        self.slots = {name: slot for slot in slots for name in slot.names}
        self.stage, self._borrowed, self.balances = stage, stage.borrowed(), Balances(stage, groups, device)
        wrapped = self._wrap(specs, precision, parallel)
        optimizer = make_optimizer(trained_parameters(stage, groups, device), adamw(parallel.offload))
        self.deepspeed = start_engine(config, specs, self.bounds, stage, wrapped=wrapped, loss=self._pipeline_loss,
                                      groups=groups, optimizer=optimizer)
        self.two_pass = TwoPassStep(self.deepspeed, self._forward_backward, self.terms, groups) \
            if getattr(objective, "two_pass", False) else None
        self.state = open_state(self.deepspeed, slots, parallel.zero_stage, groups)
        if parallel.offload_folder:
            self.state.move_to(MappedFiles(parallel.offload_folder))
        plans = {name: plan_of(slot.parameter) for name, slot in self.slots.items()}
        max_values = {name: plan.max_value for name, plan in plans.items()
                      if plan.max_value is not None and plan.trainable}
        self.step_hooks = StepHooks(self.deepspeed, self.state, groups, clip_norm, is_counted=self._counts,
                                    max_values=max_values, is_replicated=self.is_replicated)
        self.fill(source or InitialWeights(plans, seed))

    # -- construction -------------------------------------------------------------------------------------------------

    def _make_slots(self, stage: Stage) -> list[Slot]:
        slots = []
        for name, parameter in stage.named_global_parameters():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 it is already cut
            stack = plan_of(parameter).stack
            names, shape = (stack.names(name), shape[1:]) if stack else ((name,), shape)
            slots.append(Slot(names, parameter, shape, plan_of(parameter).slice_dim))
        return slots

    def _wrap(self, specs: list[LayerSpec], precision: PrecisionConfig, parallel: ParallelConfig
              ) -> dict[str, Callable]:
        """How this stage's layers are called, by name, where that is not as they are."""
        stage, cast = self.stage, self.is_replicated and precision.compute != "fp32"
        blocks = [spec.name for spec in specs if spec.recompute]
        chosen = set(blocks[:: parallel.recompute_every])  # counted over the whole model, so no layout changes it
        wrapped: dict[str, Callable] = {}
        for spec in stage.specs:
            layer = stage.by_name[spec.name]
            call: Callable = layer
            if parallel.recompute == "selective" and spec.name in chosen:
                recompute_selectively(layer)
            if cast:
                call = CastOnUse(layer, DTYPES[precision.compute])
            if parallel.loss_chunk_tokens and spec.vocabulary:
                call = waiting(call, chunked_cross_entropy(self.tp, parallel.loss_chunk_tokens))
            if parallel.recompute == "full" and spec.name in chosen:
                call = recomputed(call)
            if call is not layer:
                wrapped[spec.name] = call
        return wrapped

    # -- the step -----------------------------------------------------------------------------------------------------

    @property
    def needs_data(self) -> bool:
        """Whether this rank reads batches: the first and the last stage do, and one rank has both if V-shaped."""
        return self.groups.coordinates.pp in (0, 0 if self.v_shaped else self.layout.pipeline - 1)

    def train_step(self, batches: list[Batch] | None, step: int, learning_rate: float, tally: int = 0) -> StepResult:
        """One optimizer step over this rank's micro-batches (None where `needs_data` is false).

        `tally` is any number of this data rank; all ranks learn the sum.

        Inside DeepSpeed's `step` (and the pipeline engine's `train_batch`) `step_hooks` measures the gradient norm,
        clips, and holds bounds of weights: parallel/zero/step_hooks.py.

        Raises:
            NotFinite: the global gradient norm is NaN or infinite outside fp16 (the same on every rank).
        """
        seed_step(self.seed, step, self.groups)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.balances.begin_step(self.step_hooks.loss_scale() / self.accumulation)
        self.terms.begin_step(tally)
        micro_batches = self.terms.for_step(batches) if batches is not None else []
        if self.layout.pipeline > 1:
            self.deepspeed.train_batch(map(MicroBatch.for_pipeline, micro_batches))
            settle_tied(self.deepspeed)
        else:
            self.deepspeed.train()
            if self.two_pass:
                self.two_pass.run(micro_batches)
            else:
                for micro_batch in micro_batches:
                    self._forward_backward(micro_batch.inputs, self.terms.of(micro_batch))
        skipped = bool(getattr(self.deepspeed.optimizer, "overflow", False))
        return StepResult(self.terms.means(), float(self.step_hooks.grad_norm), skipped,
                          self.balances.end_step(taken=not skipped), tally=self.terms.tally)

    def _forward_backward(self, inputs: Any, loss: LossFunction) -> None:
        """One micro-batch on one stage; DeepSpeed steps the optimizer after the last one."""
        self.deepspeed.backward(self.deepspeed(inputs, loss))
        self.deepspeed.step()

    def _pipeline_loss(self, outputs: Any, labels: tuple[Tensor, ...]) -> Tensor:
        return self.terms.loss(outputs, MicroBatch.of_labels(labels))

    @torch.no_grad()
    def evaluate(self, batches: Batches | None) -> Losses:
        """Losses over all replicas without a gradient (`batches` None where `needs_data` is false).

        Batches are read one at a time.
        """
        self.terms.begin_evaluation()
        micro_batches = self.terms.for_evaluation(batches or ())
        if self.layout.pipeline > 1:
            self._evaluate_pipeline(micro_batches, len(batches or ()))
        else:
            self.deepspeed.eval()
            if self.two_pass:
                self.two_pass.evaluate(micro_batches)
            else:
                for micro_batch in micro_batches:
                    self.deepspeed(micro_batch.inputs, self.terms.of(micro_batch))
        return self.terms.evaluated()

    def _evaluate_pipeline(self, micro_batches: Iterable[MicroBatch], num: int) -> None:
        least = 2 * self.layout.pipeline if self.v_shaped else 1  # DualPipeV cannot run with fewer
        agreed = torch.tensor(max(num, least), device=self.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.groups.pipeline)  # middle stages read no batches
        items = map(MicroBatch.for_pipeline, _padded(micro_batches, least))
        # The terms are reduced by `LossTerms`, so DeepSpeed need not average and broadcast the loss.
        self.deepspeed.eval_batch(items, num_micro_batches=int(agreed), reduce_output=None, bcast_loss=False)

    # -- state by global name -----------------------------------------------------------------------------------------

    def _counts(self, name: str) -> bool:
        """Whether this rank's piece of a tensor is the one that counts, and is stored."""
        slot, at = self.slots[name], self.groups.coordinates
        first = slot.slice_dim is not None or at.tp == 0
        if self.is_replicated and not plan_of(slot.parameter).stack:
            first = first and at.dp % self.layout.expert == 0
        return name not in self._borrowed and first

    @torch.no_grad()
    def fill(self, source: Source) -> None:
        """Set weights, moments, buffers and the step of Adam. Only ranges that this rank keeps are read, in chunks."""
        for kind in KINDS:
            for name, start, tensor in self.state.fragments(kind):
                _fill(tensor, self._slice(name, kind).part(start, tensor.numel()), source)
        for name, buffer in self.stage.named_global_buffers():
            _fill(buffer.view(-1), SliceRange.whole(name, tuple(buffer.shape)), source)
        set_adam_step(self.state.base, source.adam_step)
        self.state.refresh()

    def _slice(self, name: str, kind: str) -> SliceRange:
        """This rank's slice of a global tensor, before ZeRO cuts it."""
        slot, shape = self.slots[name], list(self.slots[name].shape)
        if slot.slice_dim is not None:
            shape[slot.slice_dim] *= self.layout.tensor
        return SliceRange.slice(name, tuple(shape), slot.slice_dim, kind=kind, rank=self.groups.coordinates.tp,
                                size=self.layout.tensor)

    def owned_fragments(self) -> Iterator[OwnedFragment]:
        """The ranges that this rank must store, so that all ranks together store every element exactly once."""
        if self.groups.replica == self.groups.coordinates.tp == 0:
            for name, buffer in self.stage.named_global_buffers():
                yield OwnedFragment(SliceRange.whole(name, tuple(buffer.shape)), buffer.view(-1))
        if self.is_replicated and self.groups.replica >= self.layout.expert:  # the first expert group holds everything
            return
        for kind in KINDS:
            for name, start, tensor in self.state.fragments(kind):
                if self._counts(name):
                    yield OwnedFragment(self._slice(name, kind).part(start, tensor.numel()), tensor)

    def close(self) -> None:
        """Give back what DeepSpeed holds, so that another engine can be built in this process."""
        self.deepspeed.destroy()


def _fill(tensor: Tensor, wanted: SliceRange, source: Source) -> None:
    """Copy a range from a source into a flat tensor, with at most FILL_ELEMENTS of them beside it."""
    for chunk in wanted.chunks(FILL_ELEMENTS):
        start = chunk.start - wanted.start
        found, target = source.read(chunk), tensor[start : start + chunk.count]
        target.zero_() if found is None else target.copy_(found)


def _padded(micro_batches: Iterable[MicroBatch], least: int) -> Iterator[MicroBatch]:
    """The micro-batches, and behind them copies of the last one without weight until there are `least`."""
    missing = least
    last: MicroBatch | None = None
    for last in micro_batches:
        missing -= 1
        yield last
    if last is not None:
        yield from (last.without_weight() for _ in range(missing))
