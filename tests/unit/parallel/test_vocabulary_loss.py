"""The loss without all of its logits: what it says, and the memory that it takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.chunked_loss import DeferredHead, token_losses
from parallel.single_rank import single_rank
from parallel.tensor_parallel import TensorParallel
from parallel.zero.fused_loss import chunked_cross_entropy
from pretrain.models.gpt.spec import GPTConfig
from pretrain.models.vocabulary import Head
from tests.helpers.live_bytes import LiveBytes

NUM_TOKENS, VOCAB_SIZE, HIDDEN = 2048, 131_072, 16


@pytest.fixture(scope="module")
def tp():
    with single_rank() as groups:
        yield TensorParallel(groups, torch.device("cpu"))


def head_of(tp: TensorParallel, vocab_size: int, pad_to: int = 1) -> Head:
    config = GPTConfig(layers=1, hidden=HIDDEN, heads=1, vocab_size=vocab_size, sequence_length=NUM_TOKENS,
                       pad_vocab_to=pad_to)
    head = Head(config, tp, std=0.5)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return head


def losses_and_gradients(head: Head, x: Tensor, labels: Tensor, weights: Tensor, chunk_tokens: int) -> list[Tensor]:
    waits = DeferredHead(head, (x,), chunked_cross_entropy(head.tp, chunk_tokens))
    outputs = waits if chunk_tokens else head(x)
    losses, = token_losses(outputs, labels, head.tp)
    gradients = torch.autograd.grad((losses * weights).sum(), (x, head.weight))
    return [losses.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_has_no_probability_and_weights_count(dtype, tp):
    head = head_of(tp, vocab_size=90, pad_to=64).to(dtype)
    x = torch.randn(7, 3, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    labels = torch.randint(90, (7, 3), generator=torch.Generator().manual_seed(3))
    weights = (torch.arange(21).view(7, 3) % 4 != 0).float()
    plain = losses_and_gradients(head, x, labels, weights, 0)
    real = torch.log_softmax((x @ head.weight[:90].t()).float(), dim=-1).gather(-1, labels[..., None])[..., 0]
    assert torch.allclose(plain[0], -real, rtol=1e-6)
    for chunk_tokens in (1, 8, 100):
        found = losses_and_gradients(head, x, labels, weights, chunk_tokens)
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        for a, b in zip(found, plain, strict=True):
            assert (a - b).norm() <= bound * b.norm()
        assert not found[2][90:].any()


def exact(head: Head, x: Tensor, labels: Tensor) -> list[Tensor]:
    """Losses and gradients in fp64, a few tokens at a time."""
    x, weight, parts = x.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_(), []
    for rows, label in zip(x.split(128), labels.split(128), strict=True):
        losses = F.cross_entropy((rows @ weight.t()).flatten(0, 1), label.flatten(), reduction="none").view_as(label)
        losses.sum().backward()
        parts.append(losses.detach())
    return [torch.cat(parts), x.grad, weight.grad]


@pytest.mark.slow
def test_memory_at_a_large_vocabulary(tp):
    """Peak bytes beside the weight and what both give back, 2,048 tokens: at least 4 times lower.

    The chunks are compared with fp64, and not with all logits in fp32: kernels that sum a row of 131,072 of them differ
    from processor to processor by more than the bound.
    """
    head = head_of(tp, VOCAB_SIZE)
    x = torch.randn(NUM_TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(2)).requires_grad_()
    labels = torch.randint(VOCAB_SIZE, (NUM_TOKENS, 1), generator=torch.Generator().manual_seed(3))
    weights, peaks = torch.ones(NUM_TOKENS, 1), []
    for chunk_tokens in (0, 256):
        with LiveBytes() as live:
            found = losses_and_gradients(head, x, labels, weights, chunk_tokens)
        peaks.append(live.peak_bytes - sum(tensor.nbytes for tensor in found))
    for a, b in zip(found, exact(head, x, labels), strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()
    all_logits = 4 * NUM_TOKENS * VOCAB_SIZE
    assert peaks[0] >= 2 * all_logits
    assert peaks[1] <= peaks[0] / 4
    assert peaks[1] <= 0.3 * all_logits, "a chunk is an eighth of the logits"
