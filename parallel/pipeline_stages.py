"""One list of layers per model, its cut into stages, and the stage that a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

from torch import Tensor, nn

from parallel.parameter_plan import plan_of


@dataclass(frozen=True)
class LayerSpec:
    """One entry of a model's ordered layer list; built only on the ranks whose stage holds it.

    Args:
        name: global name and prefix of its parameters, the same on every layout ("blocks.3").
        build: makes the module; its forward takes and returns the running state (a tensor or a tuple of tensors).
        cost: time of forward and backward for the balanced cut, in multiply-adds of one sample's forward; of all
            layers in the same unit.
        tied_to: name of an earlier layer whose module is handed to this one's forward as second argument
            (a head that multiplies with the embedding table); that layer then also lives on this one's stage.
        same_as: name of an earlier layer whose module is this layer, all parameters included (Lan et al. 2020, ALBERT,
            section 3.1). The parameters exist once, under the earlier layer's name. Where both are on different
            stages, each stage has a copy, and the gradient is summed over them.
        recompute: whether recompute may take this layer (transformer blocks; not embeddings and heads). Of layers that
            share a module, selective recompute takes all or none.
        cached: whether its forward takes `cache=`, the keys and values of earlier tokens in generation.
        vocabulary: whether it makes logits from its input, and losses when it is given a cross entropy as
            `cross_entropy=`, see parallel/chunked_loss.py.
        with_next: whether the next layer is on the same stage (a table that only later layers use must have a user).

    Raises:
        ValueError: `same_as` together with `tied_to` (a copy on another stage has one owner) or with `cached` (keys and
            values are stored by the name of the module).
    """

    name: str
    build: Callable[[], nn.Module]
    cost: float = 1.0
    tied_to: str | None = None
    _: KW_ONLY
    same_as: str | None = None
    recompute: bool = False
    cached: bool = False
    vocabulary: bool = False
    with_next: bool = False

    def __post_init__(self) -> None:
        if self.same_as and (self.tied_to or self.cached):
            raise ValueError(f"layer {self.name} is the same as {self.same_as}, so it can be neither tied nor cached")

    @property
    def module_name(self) -> str:
        """The name that its module's parameters have."""
        return self.same_as or self.name

    @property
    def shares_with(self) -> str | None:
        """The earlier layer whose parameters this one uses, with its own or in their place."""
        return self.same_as or self.tied_to


def cut(costs: Sequence[float], num_stages: int, joined: Sequence[bool] = ()) -> list[int]:
    """Boundaries [0, .., len(costs)] of the contiguous partition that minimises the cost of its most expensive stage.

    No stage is empty.

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
    # best[k][i]: cost of the most expensive stage when the first i layers fill k stages; start[k][i]: where stage k
    # begins
    best = [[0.0] + [float("inf")] * count]
    start: list[list[int]] = [[0] * (count + 1)]
    for stage in range(1, num_stages + 1):
        row, origin = [float("inf")] * (count + 1), [0] * (count + 1)
        for end in range(stage, count + 1):
            for begin in range(stage - 1, end):
                if begin and joined and joined[begin - 1]:
                    continue
                largest = max(best[stage - 1][begin], before[end] - before[begin])
                if largest < row[end]:
                    row[end], origin[end] = largest, begin
        best.append(row)
        start.append(origin)
    bounds = [count]
    for stage in range(num_stages, 0, -1):
        bounds.append(start[stage][bounds[-1]])
    return bounds[::-1]


class Stage(nn.Module):
    """The layers of one pipeline rank, under their global names; with one stage it is the whole model.

    In a V-shaped pipeline (DualPipeV) a rank has two spans of layers: one on the way out, one on the way back.
    `by_name` has the module of every layer of this stage and of every layer whose parameters these use.
    """

    def __init__(self, specs: Sequence[LayerSpec], *spans: tuple[int, int]):
        super().__init__()
        self.spans = [list(specs[begin:end]) for begin, end in spans]
        self.specs = [spec for span in self.spans for spec in span]
        self.owned: dict[str, nn.Module] = {}  # without the second names of modules that serve several layers
        for spec in self.specs:
            if spec.same_as is None:
                self._build(spec)
        for spec in self.specs:
            if spec.shares_with and spec.shares_with not in self.owned:
                self._build(next(s for s in specs if s.name == spec.shares_with))
        self.by_name = {**self.owned, **{spec.name: self.owned[spec.module_name] for spec in self.specs}}
        # ModuleList, since a global name may hold dots; global names come from `named_global_parameters`
        self.modules_in_order = nn.ModuleList(self.owned.values())

    def _build(self, spec: LayerSpec) -> None:
        self.owned[spec.name] = spec.build()

    def named_global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(global name, parameter) of everything this stage holds, in layer order."""
        for layer, module in self.owned.items():
            for name, parameter in module.named_parameters():
                yield f"{layer}.{name}", parameter

    def named_global_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """(global name, buffer) of state that a layer learns without a gradient; whole on every rank, and part of a
        checkpoint.
        """
        for layer, module in self.owned.items():
            for name, buffer in module.named_buffers():
                yield f"{layer}.{name}", buffer

    def named_global_tensors(self) -> Iterator[tuple[str, Tensor, int | None]]:
        """(global name, local tensor, slice dim) of everything a checkpoint stores of this stage; not under ZeRO-3."""
        for name, parameter in self.named_global_parameters():
            plan = plan_of(parameter)
            parts = zip(plan.stack.names(name), parameter, strict=True) if plan.stack else [(name, parameter)]
            yield from ((part, tensor, plan.slice_dim) for part, tensor in parts)
        yield from ((name, buffer, None) for name, buffer in self.named_global_buffers())

    def borrowed(self) -> set[str]:
        """Global names of parameters of which an earlier stage has the original: those of tied and of shared layers."""
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
    """A single stage followed by a loss: what DeepSpeed's plain engine calls."""

    def __init__(self, stage: Stage, wrapped: dict[str, Callable]):
        super().__init__()
        self.stage = stage
        self.wrapped = wrapped

    def forward(self, inputs, loss: Callable):
        """What `loss` makes of the stage's outputs."""
        return loss(self.stage.run(inputs, self.wrapped))
