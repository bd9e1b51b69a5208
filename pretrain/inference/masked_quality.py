"""Loss and accuracy on corrupted text: masked tokens of an encoder, targets of an encoder-decoder.

The corruption of a sample depends on its position alone, so the same data gives the same numbers every time, equal to
those of the held-out evaluations in training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby, islice

import torch
from torch import Tensor

from common.errors import ConfigError
from data_pipeline.batch_plan import BatchPlan
from data_pipeline.corruption.noise_seed import HELDOUT
from data_pipeline.corruption.special_ids import NUM_FIXED_IDS
from data_pipeline.loader import ReadOptions, heldout_batches
from data_pipeline.tokens.in_memory_dataset import TextDataset
from data_pipeline.tokens.token_dataset import TokenDataset
from parallel.objective import Objective
from pretrain.inference.generation import answer_tokens
from pretrain.inference.language import perplexity
from pretrain.inference.trained_model import Trained
from pretrain.objectives import OBJECTIVES, make_stages

Batch = dict[str, Tensor]


def corrupted_batches(trained: Trained, dataset: TokenDataset | TextDataset, micro_batch: int,
                      num_samples: int | None) -> Iterator[Batch]:
    """The first `num_samples` samples (None: all) of a dataset in its order, corrupted, on the model's device.

    Raises:
        ConfigError: the model's length does not fit its objective.
        UserError: the dataset holds less than one sample.
    """
    objective, spec = trained.objective, OBJECTIVES[trained.objective.name]
    problems = list(spec.problems(objective, trained.model))
    if problems:
        raise ConfigError(problems, str(trained.folder))
    stages = make_stages(objective, trained.model, dataset, HELDOUT, special=trained.special)
    read = ReadOptions(spec.window_tokens(objective, trained.model), stages=stages)
    for batch in heldout_batches(dataset, BatchPlan.heldout(micro_batch), read, num_samples):
        yield {name: field.to(trained.device) for name, field in batch.items()}


@torch.inference_mode()
def masked_measures(trained: Trained, objective: Objective, batches: Iterable[Batch]) -> dict[str, float | int | str]:
    """Mean loss of the targets in nats (the objective's first term), and the fraction of them predicted right.

    Every further term has its own mean loss, `<term>_loss`; next-sentence prediction also has its accuracy.
    """
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    hits = num_targets = pair_hits = 0.0
    for batch in batches:
        outputs = trained.stage.run(objective.inputs(batch))
        logits, *scores = outputs if isinstance(outputs, tuple) else (outputs,)
        labels, weights, *not_next = targets = objective.targets(batch)
        for name, loss in objective.losses(outputs, targets).items():
            sums[name] += float(loss)
        for name, count in objective.counts(batch).items():
            counts[name] += float(count)
        num_targets += float(weights.sum())
        hits += float(((logits.argmax(dim=-1) == labels) * weights).sum())
        if scores:
            is_real = weights.sum(dim=0) > 0
            pair_hits += float((scores[0].argmax(dim=-1) == not_next[0])[is_real].sum())
    first, *others = ((name, sums[name] / counts[name]) for name in objective.terms)
    found: dict[str, float | int | str] = {
        "objective": trained.objective.name, "loss": first[1], "perplexity": perplexity(first[1]),
        "accuracy": hits / num_targets, "num_targets": round(num_targets),
        **{f"{name}_loss": mean for name, mean in others}}
    if "next_sentence" in objective.terms:
        found["next_sentence_accuracy"] = pair_hits / counts["next_sentence"]
    return found


# -- examples ---------------------------------------------------------------------------------------------------------


def examples(trained: Trained, batches: Iterable[Batch], count: int) -> list[dict[str, str]]:
    """Source, target and greedy answer of an encoder-decoder for its first `count` samples."""
    rows = ((batch, number) for batch in batches for number in range(len(batch["source"])))
    return [_example(trained, {name: field[number] for name, field in batch.items()})
            for batch, number in islice(rows, count)]


def _example(trained: Trained, sample: dict[str, Tensor]) -> dict[str, str]:
    num_targets = int(sample["weights"].sum())
    truth = sample["tokens"][1 : num_targets + 1].tolist()
    end = trained.tokenizer.end_of_text
    source = tuple(sample[name][None] for name in ("source", "source_mask") if name in sample)
    answer = answer_tokens(trained.stage, source, int(sample["tokens"][0]), num_targets, stop_token=end)
    seen = sample["source"][: int(sample["source_mask"].sum())] if "source_mask" in sample else sample["source"]
    return {"source": readable(trained, _without(end, seen.tolist())), "truth": readable(trained, _without(end, truth)),
            "answer": readable(trained, answer)}


def _without(end: int, ids: list[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] == end else ids


def readable(trained: Trained, ids: list[int]) -> str:
    """The text of ids, with names for special ids; padding has none."""
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
    return "".join(decode(group) if is_text else "".join(name(token) or "" for token in group)
                   for is_text, group in parts)
