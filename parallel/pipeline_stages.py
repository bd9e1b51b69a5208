"""One list of layers per model, its cut into stages, and the stage that a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerSpec:
    """One entry of a model's ordered layer list; built only on the ranks whose stage holds it.

    Args:
        name: global name and prefix of its parameters, the same on every layout ("blocks.3").
        build: makes the module; its forward takes and returns the running state (a tensor or a tuple of tensors).
        cost: relative time of forward and backward, for the balanced cut.
        tied_to: name of an earlier layer whose module is handed to this one's forward as second argument
            (a head that multiplies with the embedding table); that layer then also lives on this one's stage.
        recompute: whether recompute may take this layer (transformer blocks; not embeddings and heads).
        cached: whether its forward takes `cache=`, what generation remembers of earlier tokens.
        vocabulary: whether it makes logits from its input, and losses when handed a cross entropy as
            `cross_entropy=`, see parallel/chunked_loss.py.
        with_next: whether the next layer is on the same stage (a table that only later layers use must have a user).
    """

    name: str
    build: Callable[[], nn.Module]
    cost: float = 1.0
    tied_to: str | None = None
    recompute: bool = False
    cached: bool = False
    vocabulary: bool = False
    with_next: bool = False


def cut(costs: Sequence[float], num_stages: int, joined: Sequence[bool] = ()) -> list[int]:
    """Stage boundaries [0, .., len(costs)] of the contiguous cut whose dearest stage is cheapest; no stage is empty.

    Args:
        joined: for each layer whether it stays with the next one; empty for none.

    Raises:
        ValueError: fewer layers than stages.
    """
    count = len(costs)
    if count - sum(joined) < num_stages:
        raise ValueError(f"{count} layers cannot fill {num_stages} pipeline stages")
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    # best[k][i]: cost of the dearest stage when the first i layers fill k stages; start[k][i]: where stage k begins
    best = [[0.0] + [float("inf")] * count]
    start: list[list[int]] = [[0] * (count + 1)]
    for stage in range(1, num_stages + 1):
        row, origin = [float("inf")] * (count + 1), [0] * (count + 1)
        for end in range(stage, count + 1):
            for begin in range(stage - 1, end):
                if begin and joined and joined[begin - 1]:
                    continue
                dearest = max(best[stage - 1][begin], before[end] - before[begin])
                if dearest < row[end]:
                    row[end], origin[end] = dearest, begin
        best.append(row)
        start.append(origin)
    bounds = [count]
    for stage in range(num_stages, 0, -1):
        bounds.append(start[stage][bounds[-1]])
    return bounds[::-1]


class Stage(nn.Module):
    """The layers of one pipeline rank, under their global names; with one stage it is the whole model.

    In a folded pipeline a rank has two spans of layers: one on the way out, one on the way back.
    """

    def __init__(self, specs: Sequence[LayerSpec], *spans: tuple[int, int]):
        super().__init__()
        self.spans = [list(specs[begin:end]) for begin, end in spans]
        self.specs = [spec for span in self.spans for spec in span]
        self.by_name: dict[str, nn.Module] = {}
        for spec in self.specs:
            self._add(spec)
        for spec in self.specs:
            if spec.tied_to and spec.tied_to not in self.by_name:
                self._add(next(s for s in specs if s.name == spec.tied_to))
        # ModuleList, since a global name may hold dots; global names come from `named_global_parameters`
        self.modules_in_order = nn.ModuleList(self.by_name.values())

    def _add(self, spec: LayerSpec) -> None:
        self.by_name[spec.name] = spec.build()

    def named_global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(global name, parameter) of everything this stage holds, in layer order."""
        for layer, module in self.by_name.items():
            for name, parameter in module.named_parameters():
                yield f"{layer}.{name}", parameter

    def named_global_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """(global name, buffer) of what a layer learns without a gradient; whole on every rank, and part of a
        checkpoint.
        """
        for layer, module in self.by_name.items():
            for name, buffer in module.named_buffers():
                yield f"{layer}.{name}", buffer

    def named_global_tensors(self) -> Iterator[tuple[str, Tensor, int | None]]:
        """(global name, local tensor, slice dim) of everything a checkpoint stores of this stage; not under ZeRO-3."""
        for name, parameter in self.named_global_parameters():
            plan = parameter.plan
            parts = zip(plan.stack.names(name), parameter, strict=True) if plan.stack else [(name, parameter)]
            yield from ((part, tensor, plan.slice_dim) for part, tensor in parts)
        yield from ((name, buffer, None) for name, buffer in self.named_global_buffers())

    def borrowed(self) -> set[str]:
        """Global names of parameters that belong to an earlier stage and are here only because they are tied."""
        own = {spec.name for spec in self.specs}
        return {name for name, _ in self.named_global_parameters()
                if not any(name.startswith(f"{layer}.") for layer in own)}

    def run(self, state, wrapped: dict[str, Callable] | None = None, cache=None):
        """Pass the state through this stage's layers.

        Args:
            wrapped: overrides how a layer is called (compute type, recompute), by name.
            cache: handed to the layers that take one.
        """
        for spec in self.specs:
            layer = (wrapped or {}).get(spec.name, self.by_name[spec.name])
            arguments = (state, self.by_name[spec.tied_to]) if spec.tied_to else (state,)
            state = layer(*arguments, cache=cache) if spec.cached and cache is not None else layer(*arguments)
        return state


class WholeModel(nn.Module):
    """A single stage with its loss: what DeepSpeed's plain engine calls."""

    def __init__(self, stage: Stage, wrapped: dict[str, Callable], loss: Callable[[Tensor, tuple], Tensor]):
        super().__init__()
        self.stage = stage
        self.wrapped = wrapped
        self.loss = loss

    def forward(self, inputs, targets: tuple) -> Tensor:
        return self.loss(self.stage.run(inputs, self.wrapped), targets)
