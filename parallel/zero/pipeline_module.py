"""DeepSpeed's pipeline modules around a stage that we built and cut ourselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from deepspeed.pipe import LayerSpec as _PipeLayer
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from parallel.layout import Layout
from parallel.pipeline_stages import LayerSpec, Stage


class StagePipeline(PipelineModule):
    """DeepSpeed's pipeline module around a stage we built and cut ourselves."""

    def __init__(self, specs: list[LayerSpec], bounds: list[int], stage: Stage, wrapped: dict[str, Callable], *,
                 loss: Callable, layout: Layout):
        self._bounds = bounds
        self._built = (stage, wrapped)
        tied = {spec.shares_with for spec in specs if spec.shares_with}
        layers = [self._describe(spec, tied) for spec in specs]
        topology = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.replicas)
        super().__init__(layers, topology=topology, loss_fn=loss, activation_checkpoint_interval=0)

    @staticmethod
    def _describe(spec: LayerSpec, tied: set[str]):
        key = spec.name if spec.name in tied else spec.shares_with
        if key:  # DeepSpeed keeps it in a ModuleDict, which takes no dots
            return TiedLayerSpec(key.replace(".", "/"), nn.Identity)
        return _PipeLayer(nn.Identity)

    def _partition_layers(self, method: str = "") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = self._bounds
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def _build(self) -> None:
        self.stage, _ = self._built
        for layer in self._layer_specs:
            name = layer.key.replace("/", ".") if isinstance(layer, TiedLayerSpec) else None
            if name in self.stage.owned:  # all its parameters: a table has one, a shared block has many
                module = self.tied_modules[layer.key] = self.stage.owned[name]
                self.tied_weight_attrs[layer.key] = [attribute for attribute, _ in module.named_parameters()]
        self._build_calls()
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    def _build_calls(self) -> None:
        self.forward_funcs = self._calls(self.stage.specs)

    def _calls(self, specs: list[LayerSpec]) -> list[Callable]:
        stage, wrapped = self._built
        calls = []
        for spec in specs:
            call = wrapped.get(spec.name, stage.by_name[spec.name])
            calls.append(partial(_call_tied, call, stage.by_name[spec.tied_to]) if spec.tied_to else call)
        calls[-1] = partial(_call_with_gradients, calls[-1])
        return calls

    def get_tied_weights_and_groups(self) -> list:
        """Tied weights with the groups of stages that hold them, for the sum of their gradients.

        A frozen weight has none. DeepSpeed looks for the gradient at the weight. Its ZeRO 1 optimizer in 16 bits (fp16,
        or with offload) has moved it to an fp32 sum, and the tied stages would each step with their own part of it.
        """
        found = [(weight, group) for weight, group in super().get_tied_weights_and_groups() if weight.requires_grad]
        sums = [getattr(weight, "grad_accum", None) for weight, _ in found]
        return [(weight if total is None else SimpleNamespace(grad=total), group)
                for (weight, group), total in zip(found, sums, strict=True)]


class VShapedPipeline(StagePipeline, DualPipeVModule):
    """The same over the two spans of layers that a rank has in DeepSpeed's DualPipeV."""

    def _partition_layers(self, method: str = "") -> None:
        self.num_stages *= 2
        super()._partition_layers(method)
        back = self.num_stages - 1 - self.stage_id
        self.phase_bounds = [(self._local_start, self._local_stop), (self.parts[back], self.parts[back + 1])]

    def _build_calls(self) -> None:
        self.phase_funcs = [self._calls(span) for span in self.stage.spans]
        self.phase_checkpointable: list[list[Callable]] = [[], []]
        self.activate_phase(0)


def _call_with_gradients(layer: Callable, *arguments):
    """The last layer of a stage, its outputs ready for a gradient.

    The next stage sends a gradient for every real tensor, and DeepSpeed calls `backward` on each. Where all that leads
    to one is frozen, that ends at once.
    """
    outputs = layer(*arguments)
    if not torch.is_grad_enabled():
        return outputs
    return tuple(map(_needing_gradient, outputs)) if isinstance(outputs, tuple) else _needing_gradient(outputs)


def _needing_gradient(output):
    if isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad:
        return output.detach().requires_grad_()
    return output


def _call_tied(layer: Callable, tied: nn.Module, state):
    return layer(state, tied)
