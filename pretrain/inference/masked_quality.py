"""How a model restores what noise took away: hidden tokens of an encoder, damaged texts of an encoder-decoder.

The noise of a sample depends on its position alone, so the same data gives the same numbers every time; they are those
of the held-out evaluations in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, islice

import torch
from torch import Tensor

from common.errors import ConfigError
from data_pipeline.batch_plan import BatchPlan
from data_pipeline.corruption.special_ids import NUM_FIXED_IDS
from data_pipeline.loader import ReadOptions, heldout_batches
from data_pipeline.tokens.in_memory_dataset import TextDataset
from data_pipeline.tokens.token_dataset import TokenDataset
from parallel.engine import Objective
from pretrain.inference.generation import answer_tokens
from pretrain.inference.language import perplexity
from pretrain.inference.trained_model import Trained
from pretrain.objectives import HELDOUT_SEED, OBJECTIVES, make_stages

Batch = dict[str, Tensor]


def noised_batches(trained: Trained, dataset: TokenDataset | TextDataset, micro_batch: int, num_samples: int | None
                   ) -> Iterator[Batch]:
    """The first `num_samples` samples (None: all) of a dataset in its order, noised, on the model's device.

    Raises:
        ConfigError: the model's length does not fit its objective.
        DataError: the dataset holds less than one sample.
    """
    objective, spec = trained.objective, OBJECTIVES[trained.objective.name]
    problems = list(spec.problems(objective, trained.model))
    if problems:
        raise ConfigError(problems, str(trained.folder))
    stages = make_stages(objective, trained.model, dataset, HELDOUT_SEED, trained.special)
    read = ReadOptions(spec.window_tokens(objective, trained.model), stages=stages)
    for batch in heldout_batches(dataset, BatchPlan.heldout(micro_batch), read, num_samples):
        yield {name: field.to(trained.device) for name, field in batch.items()}


@torch.inference_mode()
def noised_measures(trained: Trained, objective: Objective, batches: Iterable[Batch]) -> dict[str, float | int | str]:
    """Mean loss of the hidden tokens, and the part of them that the model finds most likely.

    Where the model also judges pairs of segments, its loss and accuracy in that are numbers of their own.
    """
    nats = num_targets = hits = 0.0
    pair_nats = num_pairs = pair_hits = 0.0
    for batch in batches:
        outputs = trained.stage.run(objective.inputs(batch))
        logits, scores = outputs if isinstance(outputs, tuple) else (outputs, None)
        labels, weights, *strange = objective.targets(batch)
        nats += float(objective.loss_sum(logits, (labels, weights)))
        num_targets += float(weights.sum())
        hits += float(((logits.argmax(dim=-1) == labels) * weights).sum())
        if scores is not None:
            real = weights.sum(dim=0) > 0
            log_chances = scores.float().log_softmax(dim=-1)[real]
            pair_nats -= float(log_chances.gather(1, strange[0][real, None]).sum())
            pair_hits += float((log_chances.argmax(dim=-1) == strange[0][real]).sum())
            num_pairs += int(real.sum())
    loss = nats / num_targets
    told = {"objective": trained.objective.name, "loss": loss, "perplexity": perplexity(loss),
            "accuracy": hits / num_targets, "num_targets": round(num_targets)}
    if num_pairs:
        told |= {"next_sentence_loss": pair_nats / num_pairs, "next_sentence_accuracy": pair_hits / num_pairs}
    return told


# -- examples ---------------------------------------------------------------------------------------------------------


def examples(trained: Trained, batches: Iterable[Batch], count: int) -> list[dict[str, str]]:
    """What an encoder-decoder makes of its first `count` samples: source, truth, and the model's own greedy answer."""
    rows = ((batch, number) for batch in batches for number in range(len(batch["source"])))
    return [_example(trained, {name: field[number] for name, field in batch.items()})
            for batch, number in islice(rows, count)]


def _example(trained: Trained, sample: dict[str, Tensor]) -> dict[str, str]:
    num_targets = int(sample["weights"].sum())
    truth = sample["tokens"][1 : num_targets + 1].tolist()
    end = trained.tokenizer.end_of_text
    source = tuple(sample[name][None] for name in ("source", "source_mask") if name in sample)
    answer = answer_tokens(trained.stage, source, int(sample["tokens"][0]), num_targets, end)
    seen = sample["source"][: int(sample["source_mask"].sum())] if "source_mask" in sample else sample["source"]
    return {"source": readable(trained, _without(end, seen.tolist())), "truth": readable(trained, _without(end, truth)),
            "answer": readable(trained, answer)}


def _without(end: int, ids: list[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] == end else ids


def readable(trained: Trained, ids: list[int]) -> str:
    """The text of ids, with names for those that only the objective has; what fills up has none."""
    special = trained.special
    reserved = OBJECTIVES[trained.objective.name].reserved_ids(trained.objective, trained.model)
    names = {special.pad: "", special.start: "<s>", special.separator: "<sep>", special.mask: "<mask>"}

    def name(token: int) -> str | None:
        if token in names:
            return names[token]
        number = -1 if special.first_sentinel is None else special.first_sentinel - token
        return f"<extra_id_{number}>" if 0 <= number < reserved - NUM_FIXED_IDS else None

    decode = trained.tokenizer.decode
    parts = [(is_text, list(group)) for is_text, group in groupby(ids, lambda token: name(token) is None)]
    return "".join(decode(group) if is_text else "".join(map(name, group)) for is_text, group in parts)
