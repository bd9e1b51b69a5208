"""Encoder-decoders with experts in a pipeline that is cut inside the decoder: a stage then sends on two real tensors.

The next stage's input and the encoder's output both lead back to the encoder, so DeepSpeed traverses that part of the
graph once for each of them. Whatever is done in a backward has to be right under two traversals: the auxiliary loss of
routers, recomputation, sums of gradients. The cases are triples: a family, experts, and an option that changes what
crosses the boundary or how the graph behind it is kept.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

STEPS = 4
EXPERTS = ["model.experts=4", "model.top_k=2", "model.decoder_layers=6"]
REVIEWED = [*EXPERTS, "model.ffn=64", "model.sequence_length=64", "model.target_length=64", "optimizer.clip_norm=0"]
STRONG = [*EXPERTS, "model.balance_loss=5"]  # a step is mostly the auxiliary loss, so that counting it twice shows
UNTIED = ["model.tied_head=false"]
PREFIX = ["objective.name=prefix_lm"]
PIPELINE = ["parallel.pipeline=2"]
FOLDED = [*PIPELINE, "parallel.schedule=dualpipev", "parallel.micro_batch=1"]
ZERO_1 = ["parallel.zero_stage=1"]
FULL, SELECTIVE = ["parallel.recompute=full"], ["parallel.recompute=selective"]
BF16 = ["precision.compute=bf16"]
CASES = [  # family, ranks, what makes the model another, what must change nothing
    ("t5", 2, [*REVIEWED, "model.balance_loss=0.5"], PIPELINE),
    ("t5", 2, [*REVIEWED, "model.balance_loss=5"], PIPELINE),
    ("t5", 4, STRONG, [*PIPELINE, *ZERO_1, *SELECTIVE, "parallel.expert=2"]),
    ("t5", 2, [*STRONG, *UNTIED], [*PIPELINE, *FULL, "parallel.recompute_every=2", "parallel.micro_batch=8"]),
    ("t5", 4, [*STRONG, *PREFIX, "model.target_length=32"],
     [*PIPELINE, "parallel.tensor=2", "parallel.sequence=true", *ZERO_1, *FULL, "parallel.loss_chunk_tokens=24"]),
    ("t5", 2, STRONG, [*FOLDED, *SELECTIVE]),
    ("t5", 2, [*STRONG, *UNTIED],
     [*PIPELINE, *ZERO_1, *BF16, "precision.reduce=compute", "parallel.offload=optimizer"]),
    ("bart", 2, STRONG, [*PIPELINE, *FULL]),
    ("bart", 2, STRONG, [*PIPELINE, *ZERO_1, *SELECTIVE]),
    ("bart", 2, [*STRONG, "objective.name=span_corruption"], [*FOLDED, *ZERO_1, *FULL]),
    ("bart", 2, STRONG, [*PIPELINE, *BF16, *SELECTIVE]),
    ("bart", 2, [*STRONG, "objective.name=gap_sentences"], [*PIPELINE, *ZERO_1, *FULL]),
]  # fmt: skip


OPTIONS = [f"run.steps={STEPS}", "schedule.warmup_steps=1", "optimizer.lr=1e-3"]


@pytest.mark.parametrize(("family", "ranks", "model", "extra"), CASES, ids=str)
def test_the_curve_is_the_same(family, ranks, model, extra, runs):
    expected = runs(family, 1, [*OPTIONS, *model]).steps
    found = runs(family, ranks, [*OPTIONS, *model, *extra]).steps
    assert len(found) == len(expected) == STEPS
    bound = 2e-2 if BF16[0] in extra else 1e-5
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=bound)
    if bound < 1e-2:
        for key, share in (("grad_norm", 10), ("balance_loss", 1), ("expert_load_max", 1), ("router_entropy", 1)):
            assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=share * bound), key
