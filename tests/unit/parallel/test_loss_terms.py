"""Terms with their own denominators, spread unevenly over ranks and micro-batches, against one plain computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from parallel.chunked_loss import token_losses
from tests.helpers.marks import slow_after
from tests.helpers.ranks import run_ranks
from tests.helpers.recipes import GPT, VOCAB_SIZE, recipe_of

SAMPLES, LENGTH = 8, 16
COPY_WEIGHT = 0.3


class NextAndCopy:
    """Cross entropy of the next token over the mask `next`, and of the token itself over the mask `copy`."""

    def __init__(self, tp):
        self.tp, self.terms = tp, {"next": 1.0, "copy": COPY_WEIGHT}

    def part(self, batch, context):
        return {"tokens": context.part(batch["tokens"], overlap=1),
                **{mask: context.part(batch[mask]) for mask in ("next", "copy")}}

    def inputs(self, batch):
        return batch["tokens"][:, :-1].contiguous()

    def targets(self, batch):
        tokens = batch["tokens"]
        return tuple(x.transpose(0, 1).contiguous() for x in (
            tokens[:, 1:], batch["next"], tokens[:, :-1], batch["copy"]))

    def counts(self, batch):
        return {name: batch[name].sum() for name in self.terms}

    def losses(self, outputs, targets):
        following, next_mask, same, copy_mask = targets
        return {name: (token_losses(outputs, labels, self.tp, keep_logits=True)[0] * mask).sum()
                for name, labels, mask in (("next", following, next_mask), ("copy", same, copy_mask))}


def whole_batch(step: int) -> dict[str, torch.Tensor]:
    """Step 1: targets of `copy` in the first and third sample only, so in few micro-batches and on one data rank.
    Step 2: none of them anywhere. Targets of `next` get rarer with every sample.
    """
    generator = torch.Generator().manual_seed(step)
    rarer = torch.linspace(0.9, 0.1, SAMPLES)[:, None]
    copy = torch.zeros(SAMPLES, LENGTH)
    if step == 1:
        copy[0, 3], copy[2, :7] = 1, 1
    return {"tokens": torch.randint(VOCAB_SIZE, (SAMPLES, LENGTH + 1), generator=generator),
            "next": (torch.rand(SAMPLES, LENGTH, generator=generator) < rarer).float(), "copy": copy}


def values(**parallel: Any) -> dict:
    model = {**GPT["model"], "layers": 2, "sequence_length": LENGTH, "pad_vocab_to": 2}
    return {**GPT, "model": model, "data": {"train": "unused"}, "optimizer": {"lr": 1e-3, "clip_norm": 0.0},
            "parallel": {"micro_batch": 2, "global_batch": SAMPLES, **parallel}}


def steps_of(info, values: dict) -> list[tuple]:
    """(loss, terms, gradient norm) of an evaluation on the first batch, and of one step on each batch."""
    from parallel.layout import Layout
    from parallel.process_groups import build_groups
    from parallel.ranks.rendezvous import join
    from parallel.tensor_parallel import TensorParallel
    from pretrain.config.run_config import config_from
    from pretrain.training.build_engine import build_engine

    config = config_from(values, "test")
    join(info)
    groups = build_groups(Layout.of(config.parallel, info.world_size))
    device = torch.device("cpu")
    engine = build_engine(config, groups, device, objective=NextAndCopy(TensorParallel(groups, device)))
    share, micro = SAMPLES // groups.layout.data, config.parallel.micro_batch
    first = groups.coordinates.dp * share

    def batches(step: int) -> list[dict] | None:
        whole = whole_batch(step)
        return [{name: field[i : i + micro] for name, field in whole.items()}
                for i in range(first, first + share, micro)] if engine.needs_data else None

    held = engine.evaluate(batches(1))
    tally = 10**groups.coordinates.dp if engine.needs_data else 0
    results = [engine.train_step(batches(step), step, 1e-3, tally) for step in (1, 2)]
    # Each data rank's number counts once, whatever its tensor, context and pipeline ranks are.
    assert [result.tally for result in results] == [sum(10**rank for rank in range(groups.layout.data))] * 2
    engine.close()
    return [(held.loss, held.terms, None), *((r.loss, r.losses.terms, r.grad_norm) for r in results)]


def plain(info, values: dict) -> list[tuple]:
    """The same without the engine's arithmetic: the whole batch at once, torch's mean, torch's gradient."""
    from parallel.layout import Layout
    from parallel.process_groups import build_groups
    from parallel.ranks.rendezvous import join
    from pretrain.config.run_config import config_from
    from pretrain.training.build_engine import build_engine

    config = config_from(values, "test")
    join(info)
    engine = build_engine(config, build_groups(Layout()), torch.device("cpu"))
    optimizer = engine.deepspeed.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    found = []
    for step in (1, 2):
        batch = whole_batch(step)
        ids = batch["tokens"][:, :-1]
        logits = engine.stage.run(ids).transpose(0, 1)[..., :VOCAB_SIZE]
        terms = {}
        for name, labels in (("next", batch["tokens"][:, 1:]), ("copy", ids)):
            mask = batch[name].bool()
            terms[name] = F.cross_entropy(logits[mask], labels[mask]) if mask.any() else None
        loss = terms["next"] + (0 if terms["copy"] is None else COPY_WEIGHT * terms["copy"])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.stage.parameters()])
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        terms = {name: None if term is None else float(term) for name, term in terms.items()}
        found.append((float(loss), terms, float(norm)))
    return [(found[0][0], found[0][1], None), *found]


@pytest.fixture(scope="module")
def expected():
    return run_ranks(plain, 1, values())[0]


LAYOUTS = [
    (1, {}), (1, {"micro_batch": 1}), (2, {}), (2, {"zero_stage": 3}), (2, {"pipeline": 2}),
    (2, {"pipeline": 2, "schedule": "dualpipev", "micro_batch": 1}), (2, {"tensor": 2, "sequence": True}),
    (2, {"tensor": 2, "loss_chunk_tokens": 5}), (2, {"context": 2}), (4, {"pipeline": 2, "zero_stage": 1}),
]


@pytest.mark.parametrize(("ranks", "parallel"), slow_after(5, LAYOUTS), ids=str)
def test_every_layout_gives_the_means_of_the_whole_batch(ranks, parallel, expected):
    if parallel.get("schedule") == "dualpipev":
        deep = values(**parallel)
        deep["model"] = {**deep["model"], "layers": 4}
        shallow = values()
        shallow["model"] = deep["model"]
        expected, found = run_ranks(plain, 1, shallow)[0], run_ranks(steps_of, ranks, deep)
    else:
        found = run_ranks(steps_of, ranks, values(**parallel))
    assert expected[1][1]["copy"] > 1 and expected[2][1]["copy"] is None
    for of_rank in found:
        for (loss, terms, norm), (expected_loss, expected_terms, expected_norm) in zip(of_rank, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert terms == {name: term if term is None else pytest.approx(term, rel=1e-5)
                             for name, term in expected_terms.items()}
            assert norm == (None if expected_norm is None else pytest.approx(expected_norm, rel=1e-4))


# -- BERT --------------------------------------------------------------------------------------------------------------


def bert_batch() -> dict[str, torch.Tensor]:
    """Samples of pairs with 1 to 8 masked tokens."""
    generator = torch.Generator().manual_seed(3)

    def ids(bound: int, *shape: int) -> torch.Tensor:
        return torch.randint(bound, shape, generator=generator)

    positions = torch.stack([torch.randperm(32, generator=generator)[:SAMPLES] for _ in range(SAMPLES)])
    return {"tokens": ids(VOCAB_SIZE, SAMPLES, 32), "types": ids(2, SAMPLES, 32), "positions": positions,
            "labels": ids(VOCAB_SIZE, SAMPLES, SAMPLES), "not_next": ids(2, SAMPLES, 1),
            "weights": torch.ones(SAMPLES, SAMPLES).tril()}


def bert_step(info, values: dict) -> tuple:
    """((loss, terms) of a step, the paper's two means from the model's outputs before it)."""
    from parallel.layout import Layout
    from parallel.process_groups import build_groups
    from parallel.ranks.rendezvous import join
    from pretrain.config.run_config import config_from
    from pretrain.training.build_engine import build_engine

    config = config_from(values, "test")
    join(info)
    groups = build_groups(Layout.of(config.parallel, info.world_size))
    engine = build_engine(config, groups, torch.device("cpu"))
    batch, means = bert_batch(), None
    if info.world_size == 1:
        with torch.no_grad():
            logits, scores = engine.stage.run((batch["tokens"], batch["types"], batch["positions"]))
        counted = batch["weights"].bool()
        means = (float(F.cross_entropy(logits.transpose(0, 1)[counted], batch["labels"][counted])),
                 float(F.cross_entropy(scores, batch["not_next"][:, 0])))
    share = SAMPLES // groups.layout.data
    first = groups.coordinates.dp * share
    batches = [{name: field[i : i + 2] for name, field in batch.items()} for i in range(first, first + share, 2)]
    result = engine.train_step(batches if engine.needs_data else None, 1, 1e-3)
    engine.close()
    return result.loss, result.losses.terms, means


@pytest.mark.slow
def test_bert_is_the_papers_sum_of_two_means():
    content = {**recipe_of("bert"), "data": {"train": "unused"}}

    def on(ranks: int, **parallel: Any) -> list[tuple]:
        layout = {"micro_batch": 2, "global_batch": SAMPLES, **parallel}
        return run_ranks(bert_step, ranks, {**content, "parallel": layout})

    (loss, terms, (tokens, pairs)), = on(1)
    assert loss == pytest.approx(tokens + pairs, rel=1e-6)
    assert terms == pytest.approx({"masked_lm": tokens, "next_sentence": pairs}, rel=1e-6)
    for found in (*on(2), *on(2, pipeline=2)):
        assert found[0] == pytest.approx(loss, rel=1e-6)
        assert found[1] == pytest.approx(terms, rel=1e-6)
