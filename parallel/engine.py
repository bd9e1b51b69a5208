"""Applies every kind of parallelism to one list of layers, in one written order, and owns the step.

The order: groups -> cut into stages -> build this stage (sliced over tp; cut over dp at once under ZeRO-3) -> wrap
(compute type, recompute) -> optimizer -> DeepSpeed (ZeRO, pipeline) -> our gradient norm and clipping -> fill weights.
Whatever two libraries have an opinion on has one owner here: the loss weight, the gradient norm, clipping, the learning
rate, initial weights and the state that checkpoints store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.chunked_loss import waiting
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.gradient_cache import DataRows, GradientCache, concatenated, surrogate
from parallel.load_balance import Balances
from parallel.parameter_plan import draw, slice_of
from parallel.pipeline_stages import LayerSpec, Stage, cut
from parallel.precision import DTYPES, CastOnUse
from parallel.process_groups import Groups
from parallel.random_streams import seed_step
from parallel.recompute import recompute_selectively, recomputed
from parallel.tensor_parallel import TensorParallel
from parallel.zero.engine import init_distributed, partitioned_construction, settle_tied, start_engine
from parallel.zero.frozen_weights import open_state
from parallel.zero.fused_loss import chunked_cross_entropy
from parallel.zero.host_adam import adamw
from parallel.zero.offload import MappedFiles
from parallel.zero.optimizer_state import KINDS, OwnedFragment, Slot, set_adam_step
from parallel.zero.placeholders import trained_parameters
from parallel.zero.settings import deepspeed_config
from parallel.zero.step_hooks import StepHooks


class Objective(Protocol):
    """What the engine needs of a loss; `batch` is a dict of tensors with the micro-batch as first dim.

    One that couples all samples of the global batch says `two_pass = True`, see parallel/gradient_cache.py. One that
    can be cut along the sequence has `part(batch, context)`: the batch of this context rank's part, see
    parallel/context_parallel.py.
    """

    def inputs(self, batch: dict[str, Tensor]): ...
    def targets(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]: ...
    def num_targets(self, batch: dict[str, Tensor]) -> Tensor: ...
    def loss_sum(self, outputs, targets: tuple[Tensor, ...]) -> Tensor: ...


@dataclass(frozen=True)
class StepResult:
    """One step: `loss` is the mean over all targets of the global batch, `grad_norm` the norm before clipping.

    `routing` is what routers of experts report (`Balances.end_step`); their auxiliary losses are not in `loss`.
    """

    loss: float
    grad_norm: float
    skipped: bool
    routing: dict[str, Any] | None


class Engine:
    """A model on a layout, ready to step."""

    def __init__(self, build_layers: Callable[[TensorParallel], Sequence[LayerSpec]], objective: Objective,
                 groups: Groups, parallel: ParallelConfig, *, precision: PrecisionConfig, device: torch.device,
                 make_optimizer: Callable[[list, Callable], torch.optim.Optimizer], clip_norm: float, seed: int):
        """
        Args:
            build_layers: the family's layer list, given the tensor axis.
            make_optimizer: from [(global name, parameter)] and the kind of AdamW to the one that DeepSpeed shards.
            clip_norm: largest global gradient norm, 0 for no clipping.

        Raises:
            NoRoom: the disc of `parallel.offload_folder` is full.
        """
        self.groups, self.layout, self.objective, self.device = groups, groups.layout, objective, device
        self.seed = seed
        self.two_pass = getattr(objective, "two_pass", False)
        self.is_replicated = parallel.zero_stage == 0
        self.accumulation = parallel.global_batch // (parallel.micro_batch * self.layout.data)
        at = groups.coordinates
        config = deepspeed_config(parallel, precision, self.layout, device.type == "cuda")
        init_distributed(dist.get_backend())

        self.tp = TensorParallel(groups, device)
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
        self.deepspeed = start_engine(config, specs, self.bounds, stage, wrapped=wrapped, loss=self._weighted_loss,
                                      groups=groups, optimizer=optimizer)
        self.state = open_state(self.deepspeed, slots, parallel.zero_stage, groups)
        if parallel.offload_folder:
            self.state.move_to(MappedFiles(parallel.offload_folder))
        max_values = {name: slot.parameter.plan.max_value for name, slot in self.slots.items()
                      if slot.parameter.plan.max_value is not None and slot.parameter.plan.trainable}
        self.step_hooks = StepHooks(self.deepspeed, self.state, groups, clip_norm, is_counted=self._counts,
                                    max_values=max_values, is_replicated=self.is_replicated)
        self.fill(self._initial)

    # -- construction -------------------------------------------------------------------------------------------------

    def _make_slots(self, stage: Stage) -> list[Slot]:
        slots = []
        for name, parameter in stage.named_global_parameters():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 it is already cut
            stack = parameter.plan.stack
            names, shape = (stack.names(name), shape[1:]) if stack else ((name,), shape)
            slots.append(Slot(names, parameter, shape, parameter.plan.slice_dim))
        return slots

    def _initial(self, name: str, kind: str, shape: tuple[int, ...]) -> Tensor | None:
        """The tensor that a new run starts with; moments and buffers start at zero."""
        return draw(name, shape, self._plan(name), self.seed) if kind == "weight" and name in self.slots else None

    def _wrap(self, specs: list[LayerSpec], precision: PrecisionConfig, parallel: ParallelConfig
              ) -> dict[str, Callable]:
        """How this stage's layers are called, by name, where that is not as they are."""
        stage, cast = self.stage, self.is_replicated and precision.compute != "fp32"
        blocks = [spec.name for spec in specs if spec.recompute]
        chosen = set(blocks[:: parallel.recompute_every])  # counted over the whole model, so no layout changes it
        wrapped: dict[str, Callable] = {}
        for spec in stage.specs:
            layer = stage.by_name[spec.name]
            if parallel.recompute == "selective" and spec.name in chosen:
                recompute_selectively(layer)
            if cast:
                layer = CastOnUse(layer, DTYPES[precision.compute])
            if parallel.loss_chunk_tokens and spec.vocabulary:
                layer = waiting(layer, chunked_cross_entropy(self.tp, parallel.loss_chunk_tokens))
            if parallel.recompute == "full" and spec.name in chosen:
                layer = recomputed(layer)
            if layer is not stage.by_name[spec.name]:
                wrapped[spec.name] = layer
        return wrapped

    def _plan(self, name: str):
        return self.slots[name].parameter.plan

    def _weighted_loss(self, outputs, targets: tuple[Tensor, ...] | Callable) -> Tensor:
        if self.two_pass:  # what is to be done with the outputs differs between the passes
            return targets(outputs)
        # The last target is the weight that turns a sum over this micro-batch's targets into its share of the mean.
        return self.objective.loss_sum(outputs, targets[:-1]) * targets[-1]

    # -- the step -----------------------------------------------------------------------------------------------------

    @property
    def needs_data(self) -> bool:
        """Whether this rank reads batches: only those of the first and the last stage do; folded, that is one rank."""
        return self.groups.coordinates.pp in (0, 0 if self.v_shaped else self.layout.pipeline - 1)

    def train_step(self, batches: list[dict[str, Tensor]] | None, step: int, learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches (None where `needs_data` is false).

        Inside DeepSpeed's `step` (and the pipeline engine's `train_batch`) `step_hooks` measures the gradient norm,
        clips, and holds bounds of weights: parallel/zero/step_hooks.py.

        Raises:
            NotFinite: the global gradient norm is NaN or infinite outside fp16 (the same on every rank).
        """
        seed_step(self.seed, step, self.groups)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.balances.begin_step(self.step_hooks.loss_scale() / self.accumulation)
        items = self._items(batches, weight=None)
        if self.layout.pipeline > 1:
            loss = self.deepspeed.train_batch(iter(items))
            settle_tied(self.deepspeed)
        else:
            loss = torch.zeros((), device=self.device)
            self.deepspeed.train()
            for inputs, targets in self._passes(items, loss) if self.two_pass else items:
                micro_loss = self.deepspeed(inputs, targets)
                self.deepspeed.backward(micro_loss)
                self.deepspeed.step()
                if not self.two_pass:
                    loss += micro_loss.detach() / (self.accumulation * self.layout.replicas)
            if self.layout.replicas > 1:
                dist.all_reduce(loss, group=self.groups.replicas)  # replicas: each saw its share of the batch's tokens
        skipped = bool(getattr(self.deepspeed.optimizer, "overflow", False))
        routing = self.balances.end_step(taken=not skipped)
        return StepResult(float(loss), float(self.step_hooks.grad_norm), skipped, routing)

    def _passes(self, items: list, loss: Tensor) -> Iterator[tuple]:
        """(inputs, what to do with the outputs) of each micro-batch's pass with gradient; adds to `loss`, as a mean.

        With one micro-batch that is the loss itself; with more of them a first pass without gradient comes before.
        """
        share = self.accumulation * self.layout.replicas

        def of_all(outputs):
            whole = self._whole_batch_loss(outputs, items)
            loss.add_(whole.detach() / share)
            return whole

        if len(items) == 1:
            yield items[0][0], of_all
            return
        states, parts = [], []
        for inputs, _ in items:
            states.append(torch.get_rng_state())  # dropout must drop the same in the second pass
            with torch.no_grad():
                parts.append(self.deepspeed(inputs, tuple))
        cache = GradientCache(parts)
        of_all(cache.outputs).backward()
        for (inputs, _), state, gradients in zip(items, states, cache.gradients(), strict=True):
            torch.set_rng_state(state)
            yield inputs, partial(surrogate, gradients=gradients)

    def _whole_batch_loss(self, outputs, items: list) -> Tensor:
        """The weighted loss of this rank's samples among those of all data ranks."""
        targets = concatenated([targets[:-1] for _, targets in items])
        return self.objective.loss_sum(outputs, targets, DataRows(self.groups)) * items[0][1][-1]

    def _items(self, batches, weight: float | None) -> list:
        """(inputs, targets + weight) per micro-batch; with no weight given, the one that makes the mean exact.

        DeepSpeed divides by the number of micro-batches and averages over the replicas, so a token mean over the
        global batch needs that back: weight = micro-batches * replicas / targets in the global batch.
        """
        if batches is None:
            return []
        batches = self._own_parts(batches)
        if weight is None:
            total = self._total_targets(batches)
            factor = self.accumulation * self.layout.replicas / total
        else:
            factor = torch.full((), weight, device=self.device)
        return [(self.objective.inputs(b), (*self.objective.targets(b), factor)) for b in batches]

    def _own_parts(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Batches on the device, each cut to this context rank's part of the sequence before any layer."""
        moved = [{key: value.to(self.device, non_blocking=True) for key, value in batch.items()} for batch in batches]
        return moved if self.layout.context == 1 else [self.objective.part(b, self.tp.context) for b in moved]

    def _total_targets(self, batches: list[dict[str, Tensor]]) -> Tensor:
        total = torch.stack([self.objective.num_targets(b).double() for b in batches]).sum()
        if self.layout.replicas > 1:
            dist.all_reduce(total, group=self.groups.replicas)  # replicas: the batch's tokens are spread over them
        return total.float()

    @torch.no_grad()
    def evaluate(self, batches: list[dict[str, Tensor]] | None) -> tuple[float, float]:
        """(sum of losses, number of targets) over all replicas; each rank passes as many micro-batches."""
        items = self._items(batches, weight=1.0)
        count = self._total_targets(self._own_parts(batches)) if batches else torch.zeros((), device=self.device)
        if self.layout.pipeline > 1:
            missing = 2 * self.layout.pipeline - len(items) if self.v_shaped and items else 0  # DualPipeV needs as many
            items += [(inputs, (*targets[:-1], targets[-1] * 0)) for inputs, targets in items[:1] * missing]
            num = torch.tensor(len(items), device=self.device)
            dist.all_reduce(num, op=dist.ReduceOp.MAX, group=self.groups.pipeline)  # middle stages hold no data
            dist.all_reduce(count, op=dist.ReduceOp.MAX, group=self.groups.pipeline)
            mean = self.deepspeed.eval_batch(iter(items), num_micro_batches=int(num))
            return float(mean) * int(num) * self.layout.replicas, float(count)
        self.deepspeed.eval()
        total = torch.zeros((), device=self.device)
        if self.two_pass and items:
            total += self._whole_batch_loss(concatenated([self.deepspeed(inputs, tuple) for inputs, _ in items]), items)
        for inputs, targets in items if not self.two_pass else ():
            total += self.deepspeed(inputs, targets)
        if self.layout.replicas > 1:
            dist.all_reduce(total, group=self.groups.replicas)  # replicas: each evaluated its share
        return float(total), float(count)

    # -- state by global name -----------------------------------------------------------------------------------------

    def _counts(self, name: str) -> bool:
        """Whether this rank's piece of a tensor is the one that counts, and is stored."""
        slot, at = self.slots[name], self.groups.coordinates
        first = slot.slice_dim is not None or at.tp == 0
        if self.is_replicated and not slot.parameter.plan.stack:
            first = first and at.dp % self.layout.expert == 0
        return name not in self._borrowed and first

    def global_shape(self, name: str) -> tuple[int, ...]:
        slot = self.slots[name]
        shape = list(slot.shape)
        if slot.slice_dim is not None:
            shape[slot.slice_dim] *= self.layout.tensor
        return tuple(shape)

    @torch.no_grad()
    def fill(self, source: Callable[[str, str, tuple[int, ...]], Tensor | None], adam_step: int = 0) -> None:
        """Set weights and moments from whole tensors: `source(name, kind, global shape)`, None for zeros."""
        tp = self.groups.coordinates.tp
        for kind in KINDS:
            for fragment in self.state.fragments(kind):
                whole = source(fragment.name, kind, self.global_shape(fragment.name))
                if whole is None:
                    fragment.tensor.zero_()
                    continue
                local = slice_of(whole, self.slots[fragment.name].slice_dim, tp, self.layout.tensor)
                flat = local.reshape(-1)[fragment.start : fragment.start + fragment.tensor.numel()]
                fragment.tensor.copy_(flat)
        for name, buffer in self.stage.named_global_buffers():
            whole = source(name, "weight", tuple(buffer.shape))
            buffer.zero_() if whole is None else buffer.copy_(whole)
        set_adam_step(self.state.base, adam_step)
        self.state.refresh()

    def owned_fragments(self) -> Iterator[OwnedFragment]:
        """What this rank must store so that all ranks together store everything exactly once."""
        at = self.groups.coordinates
        if self.groups.replica == at.tp == 0:
            for name, buffer in self.stage.named_global_buffers():
                yield OwnedFragment(name, "weight", tuple(buffer.shape), None, slice_rank=0, slice_size=1, start=0,
                                    tensor=buffer.view(-1))
        if self.is_replicated and self.groups.replica >= self.layout.expert:  # the first expert group holds everything
            return
        for kind in KINDS:
            for name, start, tensor in self.state.fragments(kind):
                if self._counts(name):
                    sliced = self.slots[name].slice_dim is not None
                    yield OwnedFragment(name, kind, self.global_shape(name), self.slots[name].slice_dim,
                                        slice_rank=at.tp if sliced else 0,
                                        slice_size=self.layout.tensor if sliced else 1, start=start, tensor=tensor)

    def close(self) -> None:
        """Give back what DeepSpeed holds, so that another engine can be built in this process."""
        self.deepspeed.destroy()
