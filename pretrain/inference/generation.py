"""Continuing a text with a trained decoder and a key-value cache; answering a source with an encoder-decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.pipeline_stages import Stage
from pretrain.models.blocks import Cache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: logits are divided by it; 0 takes the most likely token (greedy).
        top_k: only the k most likely tokens (Fan et al. 2018); 0 for all.
        top_p: only the smallest set of tokens whose probability reaches p (nucleus, Holtzman et al. 2020, eq. 3).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> int:
    """The next token from logits [v], fp32."""
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    ordered, ids = (logits / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        ordered, ids = ordered[: sampling.top_k], ids[: sampling.top_k]
    probabilities = ordered.softmax(dim=-1)
    if sampling.top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of the more likely tokens; the first stays
        probabilities = torch.where(before < sampling.top_p, probabilities, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


@torch.inference_mode()
def continue_tokens(stage: Stage, prompt: list[int], max_tokens: int, context_tokens: int, *, sampling: Sampling,
                    stop_token: int | None, seed: int = 0) -> Iterator[int]:
    """Yield up to `max_tokens` new tokens, until `stop_token` (not yielded) or the model's context is full.

    Args:
        stage: the whole model on this process; ids [1, s] -> logits [s, 1, v].
        prompt: at least one token and fewer than `context_tokens`.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(stage.parameters()).device
    cache = Cache(max_tokens=context_tokens)
    pending = prompt
    for _ in range(min(max_tokens, context_tokens - len(prompt))):
        logits = stage.run(torch.tensor([pending], device=device), cache=cache)
        cache.length += len(pending)
        token = choose(logits[-1, 0].float().cpu(), sampling, generator)
        if token == stop_token:
            return
        yield token
        pending = [token]


@torch.inference_mode()
def answer_tokens(stage: Stage, source: tuple[Tensor, ...], start_token: int, max_tokens: int, *, stop_token: int
                  ) -> list[int]:
    """The most likely token after token (greedy), until `stop_token` (not included) or `max_tokens`.

    Both sides are computed again for every token: there is no cache here, so this is for a few examples.

    Args:
        stage: a whole encoder-decoder on this process; (source, decoder ids[, mask]) -> logits [t, 1, v].
        source: ids int64 [1, s], and their mask [1, s] where the source is padded.
    """
    ids, *mask = source
    tokens = [start_token]
    while len(tokens) <= max_tokens:
        logits = stage.run((ids, torch.tensor([tokens], device=ids.device), *mask))
        token = int(logits[-1, 0].argmax())
        if token == stop_token:
            break
        tokens.append(token)
    return tokens[1:]
