"""A mixture of experts against a plain loop over dense experts, its auxiliary losses, capacity, and odd input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.expert_parallel import grouped_kernel, grouped_linear
from parallel.load_balance import Balance
from parallel.recompute import recompute_selectively, recomputed
from parallel.single_rank import single_rank
from parallel.tensor_parallel import TensorParallel
from pretrain.models.feed_forward import Mixture, within_capacity
from pretrain.models.shapes import BlockShape, MixtureShape

LENGTH, BATCH, HIDDEN, EXPERTS = 12, 3, 8, 5
PLAIN = {"experts": EXPERTS, "top_k": 2, "ffn": 16, "shared_ffn": 0, "renormalised": True, "capacity_factor": None,
         "balance_loss": 0.0, "z_loss": 0.0, "bias_rate": 0.0}


@pytest.fixture(scope="module")
def groups():
    with single_rank() as found:
        yield found


def mixture_of(groups, activation="gelu", bias=True, **changes) -> Mixture:
    shape = BlockShape(hidden=HIDDEN, heads=1, kv_heads=1, head_dim=HIDDEN, ffn=16, num_tokens=LENGTH,
                       norm="layernorm", norm_position="pre", norm_epsilon=1e-5, activation=activation, bias=bias,
                       dropout=0.0, attention_dropout=0.0, std=0.5, residual_std=0.5)
    layer = Mixture(shape, MixtureShape(**{**PLAIN, **changes}), TensorParallel(groups, torch.device("cpu")))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return layer


def tokens() -> torch.Tensor:
    return torch.randn(LENGTH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(5), requires_grad=True)


def dense_loop(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Every expert works on every token; the router's choice only decides what is added."""
    experts, shape = layer.experts, layer.router.mixture
    probabilities = F.softmax(F.linear(x, layer.router.weight), -1)
    values, chosen = probabilities.topk(shape.top_k)
    values = values / values.sum(-1, keepdim=True) if shape.renormalised else values
    capacity = LENGTH if shape.capacity_factor is None else -(-shape.capacity_factor * shape.top_k * LENGTH // EXPERTS)
    taken = torch.zeros(BATCH, EXPERTS)
    rows = torch.zeros(LENGTH, BATCH, EXPERTS)
    for choice in range(shape.top_k):
        for position in range(LENGTH):
            for sample in range(BATCH):
                expert = chosen[position, sample, choice]
                taken[sample, expert] += 1
                rows[position, sample, expert] = taken[sample, expert] <= capacity
    outputs = []
    for index in range(EXPERTS):
        y = F.linear(x, experts.up.weight[index], None if experts.up.bias is None else experts.up.bias[index])
        y = F.gelu(y) if experts.gate is None else F.silu(F.linear(x, experts.gate.weight[index])) * y
        outputs.append(F.linear(y, experts.down.weight[index],
                                None if experts.down.bias is None else experts.down.bias[index]))
    weights = torch.zeros(LENGTH, BATCH, EXPERTS).scatter(-1, chosen, values) * rows
    y = (torch.stack(outputs, -2) * weights.unsqueeze(-1)).sum(-2)
    return y if layer.shared is None else y + layer.shared(x)


@pytest.mark.parametrize("changes", [
    {}, {"top_k": 1, "renormalised": False}, {"top_k": 1, "renormalised": False, "capacity_factor": 1.0},
    {"capacity_factor": 0.5}, {"top_k": 3, "renormalised": False, "shared_ffn": 6},
    {"activation": "swiglu", "bias": False}, {"top_k": EXPERTS},
], ids=str)  # fmt: skip
def test_output_and_gradients_are_those_of_a_dense_loop(changes, groups):
    layer, x = mixture_of(groups, **changes), tokens()
    told = torch.randn(LENGTH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(7))
    found = layer(x)
    found_gradients = torch.autograd.grad((found * told).sum(), [x, *layer.parameters()])
    expected = dense_loop(layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(found_gradients, torch.autograd.grad((expected * told).sum(), [x, *layer.parameters()]),
                          strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"activation": "swiglu", "bias": False, "shared_ffn": 6}], ids=str)
def test_recompute_changes_nothing(changes, groups):
    results = []
    for prepare, call in ((lambda layer: None, lambda layer: layer), (recompute_selectively, lambda layer: layer),
                          (lambda layer: None, recomputed)):
        layer, x = mixture_of(groups, **changes), tokens()
        prepare(layer)
        call(layer)(x).square().sum().backward()
        results.append([layer.router.balance.totals, x.grad, *(parameter.grad for parameter in layer.parameters())])
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_capacity_drops_in_training_only(groups):
    layer, x = mixture_of(groups, capacity_factor=0.25), tokens()
    assert not torch.allclose(layer(x), layer.eval()(x))
    torch.testing.assert_close(layer(x), mixture_of(groups).eval()(x))


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 9), count=st.integers(1, 3), experts=st.integers(1, 6), factor=st.floats(0.1, 2.0),
       data=st.data())
def test_capacity_serves_first_choices_then_earlier_tokens(length, count, experts, factor, data):
    top_k = data.draw(st.integers(1, experts))
    seed = data.draw(st.integers(0, 1000))
    scores = torch.rand(length, count, experts, generator=torch.Generator().manual_seed(seed))
    chosen = scores.topk(top_k).indices
    kept = within_capacity(chosen, experts, factor)
    room = -(-factor * top_k * length // experts)
    for sample in range(count):
        queue = [(choice, position) for choice in range(top_k) for position in range(length)]
        for expert in range(experts):
            waiting = [place for place in queue if chosen[place[1], sample, place[0]] == expert]
            served = [place for place in waiting if kept[place[1], sample, place[0]]]
            assert served == waiting[: int(room)]


def test_auxiliary_losses_reach_the_gradient_and_the_report(groups):
    layer, x = mixture_of(groups, balance_loss=0.3, z_loss=0.2), tokens()
    balance = layer.router.balance
    balance.gradient_scale = 0.5
    probabilities = (logits := F.linear(x, layer.router.weight)).softmax(-1)
    load = torch.zeros(BATCH, EXPERTS).scatter_add(
        1, probabilities.topk(2).indices.permute(1, 0, 2).flatten(1), torch.ones(BATCH, 2 * LENGTH))
    shares = load / (2 * LENGTH)
    balance_loss = EXPERTS * (shares * probabilities.mean(0)).sum(1)
    z_loss = torch.logsumexp(logits, -1).square().mean(0)
    total = dense_loop(layer, x).sum() + 0.5 * (0.3 * balance_loss.mean() + 0.2 * z_loss.mean())
    expected = torch.autograd.grad(total, [x, layer.router.weight], retain_graph=True)
    found = torch.autograd.grad(layer(x).sum(), [x, layer.router.weight])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(balance.totals[:EXPERTS].float(), load.sum(0))
    torch.testing.assert_close(balance.totals[-2:].float(), torch.stack([balance_loss.sum(), z_loss.sum()]))


def test_the_bias_of_an_expert_moves_against_its_load_and_only_chooses(groups):
    balance = Balance(3, bias_rate=0.25, device=torch.device("cpu"))
    balance.shift(torch.tensor([9.0, 3.0, 6.0]))
    assert balance.bias.tolist() == [-0.25, 0.25, 0.0]
    layer, x = mixture_of(groups, top_k=1, renormalised=False, bias_rate=0.1), tokens()
    layer.router.balance.bias[2] = 10.0
    chosen, weights, _ = layer.router(x)
    assert (chosen == 2).all()
    torch.testing.assert_close(weights[..., 0], F.linear(x, layer.router.weight).softmax(-1)[..., 2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_router_that_is_not_finite_gives_a_result_that_is_not(value, groups):
    layer, x = mixture_of(groups, balance_loss=0.1, capacity_factor=1.0, bias_rate=0.1), tokens()
    with torch.no_grad():
        layer.router.weight[1] = value
    y = layer(x)
    y.sum().backward()
    assert not torch.isfinite(layer.router.weight.grad).all()
    assert layer.router.balance.totals[:EXPERTS].sum() == 2 * LENGTH * BATCH


@pytest.mark.parametrize("counts", [[3, 0, 5], [8, 0, 0]], ids=str)
def test_the_grouped_kernel_is_the_loop(counts):
    """torch runs it on a CPU as well, only not as one kernel."""
    generator = torch.Generator().manual_seed(1)
    x, told = (torch.randn(8, 16, generator=generator).bfloat16() for _ in range(2))
    weight = torch.randn(3, 16, 16, generator=generator).bfloat16().requires_grad_()
    x.requires_grad_()
    results = []
    for product in (lambda: grouped_kernel(x, weight, counts), lambda: grouped_linear(x, weight, None, counts)):
        y = product()
        results.append((y, *torch.autograd.grad((y * told).sum(), [x, weight])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_graph_that_is_traversed_twice_counts_once(recompute, groups):
    """As in a pipeline stage that sends on two tensors: `backward` is called for each, over one graph."""
    found = []
    for traversals in (1, 2):
        layer = mixture_of(groups, balance_loss=3.0, z_loss=0.1).train()
        if recompute == "selective":
            recompute_selectively(layer)
        y = (recomputed(layer) if recompute == "full" else layer)(tokens())
        outputs, gradients = (y.sin(), y.cos()), (torch.full_like(y, 0.5), torch.full_like(y, 0.25))
        if traversals == 1:
            torch.autograd.backward(outputs, gradients)
        else:
            outputs[0].backward(gradients[0], retain_graph=True)
            outputs[1].backward(gradients[1])
        found.append((layer.router.balance.totals, [parameter.grad for parameter in layer.parameters()]))
    (totals, once), (other_totals, twice) = found
    assert torch.equal(totals, other_totals)
    for one, other in zip(once, twice, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
