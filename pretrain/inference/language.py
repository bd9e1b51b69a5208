"""Loss of a decoder: per token, as perplexity, and in bits per byte, which compares across tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from math import exp, inf, log
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.objective import Objective
from parallel.pipeline_stages import Stage

MAX_EXPONENT = 700.0


class Text(NamedTuple):
    """Documents as one stream: the token ids of each with its end-of-text, and their length in UTF-8 bytes."""

    documents: Iterable[list[int]]
    text_bytes: int
    end_of_text: int


def stream_batches(text: Text, sequence_length: int, micro_batch: int, device: torch.device
                   ) -> Iterator[dict[str, Tensor]]:
    """Every token of every document as a target exactly once, in windows that overlap by one token.

    The first token is predicted from an end-of-text; padding of the last window has weight 0.

    Yields: `tokens` int64 [b, sequence_length + 1] and `weights` fp32 [b, sequence_length].
    """
    tokens = chain([text.end_of_text], chain.from_iterable(text.documents))
    window = list(islice(tokens, sequence_length + 1))
    rows: list[list[int]] = []
    while len(window) > 1:
        rows.append(window)
        if len(rows) == micro_batch:
            yield _batch(rows, sequence_length, text.end_of_text, device)
            rows = []
        window = [window[-1], *islice(tokens, sequence_length)]
    if rows:
        yield _batch(rows, sequence_length, text.end_of_text, device)


def _batch(rows: list[list[int]], length: int, filler: int, device: torch.device) -> dict[str, Tensor]:
    tokens = torch.full((len(rows), length + 1), filler)
    weights = torch.zeros(len(rows), length)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
        weights[number, : len(row) - 1] = 1.0
    return {"tokens": tokens.to(device), "weights": weights.to(device)}


@torch.inference_mode()
def summed_loss(stage: Stage, objective: Objective, batches: Iterable[dict[str, Tensor]]) -> tuple[float, int]:
    """(sum of losses in nats, number of targets) over batches of an objective of one term with independent samples."""
    name, = objective.terms
    total, count = 0.0, 0.0
    for batch in batches:
        outputs = stage.run(objective.inputs(batch))
        total += float(objective.losses(outputs, objective.targets(batch))[name])
        count += float(objective.counts(batch)[name])
    return total, round(count)


def perplexity(loss: float) -> float:
    """e^loss; infinite beyond the range of a float."""
    return exp(loss) if loss < MAX_EXPONENT else inf


def language_measures(nats: float, num_tokens: int, text_bytes: int) -> dict[str, float | int]:
    """Measures of a text of `num_tokens` targets whose losses sum up to `nats`."""
    loss = nats / num_tokens
    return {"loss": loss, "perplexity": perplexity(loss),
            "bits_per_byte": nats / log(2) / text_bytes, "num_tokens": num_tokens, "text_bytes": text_bytes}
