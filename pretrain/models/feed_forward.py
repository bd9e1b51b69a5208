"""Feed-forward parts of a block: dense, or a mixture of experts. Shapes as in blocks.py.

In a mixture: T = s x b tokens, E experts, k choices of each token.
"""

from __future__ import annotations

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.expert_parallel import Dispatch, ExpertParallel
from parallel.load_balance import Balance
from parallel.parameter_plan import plan_parameter
from parallel.recompute import Recomputable
from parallel.tensor_parallel import TensorParallel
from pretrain.models.shapes import BlockShape, MixtureShape

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # Hendrycks & Gimpel 2016, section 2
}
GATES = {"swiglu": F.silu, "geglu_tanh": ACTIVATIONS["gelu_tanh"]}


class _Matrices(Recomputable):
    """Two matrices with an activation, or gated as in SwiGLU(x) = silu(x W_gate) * (x W_up) (Shazeer 2020, eq. 6).

    With `matrices` an `ExpertParallel` each of them is a stack, one for each expert of this rank.
    """

    def __init__(self, shape: BlockShape, ffn: int, matrices: TensorParallel | ExpertParallel):
        super().__init__()
        self.activation = GATES.get(shape.activation) or ACTIVATIONS[shape.activation]
        self.up = matrices.column(shape.hidden, ffn, bias=shape.bias, std=shape.up_std or shape.std)
        self.gate = matrices.column(shape.hidden, ffn, bias=shape.bias, std=shape.std) if shape.gated else None
        down_std = shape.residual_std if shape.down_std is None else shape.down_std
        self.down = matrices.row(ffn, shape.hidden, bias=shape.bias, std=down_std)

    def _apply_matrices(self, x: Tensor, *counts: list[int]) -> Tensor:
        """`counts`: rows of each expert, where the matrices are stacks."""
        def down(y: Tensor) -> Tensor:
            return self.down(y, *counts)

        if self.gate is None:
            return self.recompute_before(down, self.activation, self.up(x, *counts))
        return self.recompute_before(down, self._gated, self.up(x, *counts), self.gate(x, *counts))

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.activation(gate) * y


class FeedForward(_Matrices):
    """The feed-forward part that every token passes."""

    def __init__(self, shape: BlockShape, tp: TensorParallel, ffn: int | None = None):
        """`ffn` None: the width of the shape."""
        super().__init__(shape, shape.ffn if ffn is None else ffn, tp)

    def forward(self, x: Tensor) -> Tensor:  # [s(/t), b, h] -> same
        return self._apply_matrices(x)


class Router(nn.Module):
    """Which experts a token is sent to, with which weights; in fp32 whatever the compute type.

    Everything that looks at several tokens looks at one sequence (the group of Lepikhin et al. 2020, GShard, section
    2.2), so that no layout and no size of micro-batch changes it.
    """

    def __init__(self, mixture: MixtureShape, hidden: int, std: float, tp: TensorParallel):
        super().__init__()
        self.mixture = mixture
        self.weight = nn.Parameter(torch.empty(mixture.experts, hidden, device=tp.device))
        plan_parameter(self.weight, std=std, keep_fp32=True)
        self.balance = Balance(mixture.experts, mixture.bias_rate, tp.device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [s, b, h], whole sequences -> experts int64 [s, b, k], their weights fp32 [s, b, k], and bool [s, b, k],
        False where a choice is dropped (None: all are kept).
        """
        logits = F.linear(x.float(), self.weight.float())
        probabilities = logits.softmax(-1)
        preference = probabilities if self.balance.bias is None else probabilities + self.balance.bias
        chosen = preference.topk(self.mixture.top_k).indices
        weights = probabilities.gather(-1, chosen)
        if self.mixture.renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        kept = None
        if self.training and self.mixture.capacity_factor is not None:
            kept = within_capacity(chosen, self.mixture.experts, self.mixture.capacity_factor)
        if self.training and torch.is_grad_enabled():
            weights = self._balanced(weights, logits, probabilities, chosen, kept=kept)
        return chosen, weights, kept

    def _balanced(self, weights: Tensor, logits: Tensor, probabilities: Tensor, chosen: Tensor, *,
                  kept: Tensor | None) -> Tensor:
        """The weights, with the auxiliary losses attached to their backward.

        Load balance: E sum_i f_i P_i of each sequence, f_i the share of its choices that fall on expert i (before any
        is dropped) and P_i its mean probability; 1 when even (Fedus et al. 2021, Switch, eq. 4 to 6, which has k = 1).
        z: mean square of the log-sum-exp of the logits (Zoph et al. 2022, ST-MoE, eq. 5).
        """
        mixture, (length, count, _) = self.mixture, logits.shape
        load = F.one_hot(chosen, mixture.experts).sum((0, 2))  # [b, E]
        balance = mixture.experts * (load / (length * mixture.top_k) * probabilities.mean(0)).sum(-1)  # [b]
        z = logits.logsumexp(-1).square().mean(0)  # [b]
        statistics = {
            "tokens": load.new_tensor(length * count), "kept": load.sum() if kept is None else kept.sum(),
            "entropy": torch.special.entr(probabilities).sum(), "sequences": load.new_tensor(count),
            "balance_loss": balance.sum(), "z_loss": z.sum(),
        }
        loss = mixture.balance_loss * balance.mean() + mixture.z_loss * z.mean()
        return self.balance.attach(weights, loss, load.sum(0), statistics)


def within_capacity(chosen: Tensor, num_experts: int, capacity_factor: float) -> Tensor:
    """Which choices int64 [s, b, k] an expert has room for, bool of the same shape.

    In each sequence an expert takes ceil(capacity_factor k s / E) choices (Lepikhin et al. 2020, GShard, section 2.2):
    all first choices come before all second ones, and earlier tokens before later ones.
    """
    length, count, top_k = chosen.shape
    capacity = ceil(capacity_factor * top_k * length / num_experts)
    queue = chosen.permute(1, 2, 0).flatten(1)  # [b, k s], in order of precedence
    by_expert = queue.argsort(dim=1, stable=True)
    load = F.one_hot(queue, num_experts).sum(1)  # [b, E]
    begins = load.cumsum(1) - load
    sorted_experts = queue.gather(1, by_expert)
    place = torch.arange(top_k * length, device=chosen.device) - begins.gather(1, sorted_experts)
    kept = torch.empty_like(queue, dtype=torch.bool).scatter_(1, by_expert, place < capacity)
    return kept.view(count, top_k, length).permute(2, 0, 1)


class Experts(_Matrices):
    """The feed-forward parts of this rank's experts; shapes and names are those of `FeedForward`, stacked."""

    def __init__(self, shape: BlockShape, mixture: MixtureShape, tp: TensorParallel):
        experts = ExpertParallel(mixture.experts, tp)
        super().__init__(shape, mixture.ffn, experts)
        self.tp = experts

    def forward(self, x: Tensor, chosen: Tensor, kept: Tensor | None) -> Tensor:
        """x [T, h], chosen and kept [T, k] -> [k, T, h], a partial sum over the tensor axis; 0 where dropped."""
        path = Dispatch(chosen, kept, self.tp)
        return path.combine(self._apply_matrices(path.dispatch(x), path.counts))


class Mixture(nn.Module):
    """Each token's sum of a few experts' outputs, by the router's weights, in place of one feed-forward part."""

    def __init__(self, shape: BlockShape, mixture: MixtureShape, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.router = Router(mixture, shape.hidden, shape.std, tp)
        self.experts = Experts(shape, mixture, tp)
        self.shared = FeedForward(shape, tp, mixture.shared_ffn) if mixture.shared_ffn else None

    def forward(self, x: Tensor) -> Tensor:  # [s(/t), b, h] -> same
        # Every tensor rank routes alike, so the router's gradient is whole on each. The experts' outputs are partial
        # sums until the end, and so are their contributions to the gradient of the weights.
        chosen, weights, kept = self.router(self.tp.gather_sequence(x))
        weights = self.tp.copy_to_ranks(weights)
        whole = self.tp.gather_for_columns(x)
        y = self.experts(whole.flatten(0, 1), chosen.flatten(0, 1), None if kept is None else kept.flatten(0, 1))
        y = (y * weights.flatten(0, 1).t().unsqueeze(-1).to(y.dtype)).sum(0).view(whole.shape)
        y = self.tp.reduce_from_ranks(y)
        return y if self.shared is None else y + self.shared(x)
