"""Options in company: what the other parity cases train apart is trained together here, and gives the same curve.

The cases are few and each holds many pairs. `e2e/test_pairs.py` walks all pairs and names one that no case holds.
"""

from __future__ import annotations

import pytest

from tests.helpers.runs import SHORT, check_reference, check_same

pytestmark = pytest.mark.slow

EXPERTS = ["model.experts=4"]
UNTIED = ["model.tied_head=false"]
ROOM = ["model.vocab_size=544"]  # for what an objective needs beside the tokenizer's ids
MIDDLE = [*ROOM, "objective.name=fill_in_the_middle"]
GAPS = ["objective.name=gap_sentences"]
PREFIX = ["objective.name=prefix_lm"]
BF16 = ["precision.compute=bf16"]
REDUCE = ["precision.reduce=compute"]
CHUNKS = ["parallel.loss_chunk_tokens=24"]
SELECTIVE = ["parallel.recompute=selective"]
SPARSE = ["parallel.recompute=full", "parallel.recompute_every=2"]
TENSOR = ["parallel.tensor=2"]
SEQUENCE = [*TENSOR, "parallel.sequence=true"]
OFFLOAD = ["parallel.offload=optimizer"]
FOLDED = ["parallel.pipeline=2", "parallel.schedule=dualpipev"]
SPREAD = ["parallel.expert=2"]
FASTER = ["optimizer.lr=4e-3"]  # BERT learns little in six steps at 1e-3
WHOLE = ["parallel.micro_batch=8"]  # one micro-batch a step


def zero(stage: int) -> list[str]:
    return [f"parallel.zero_stage={stage}"]


CASES = [  # family, ranks, what makes the model or its loss another, what must change nothing
    ("gpt", 2, [*MIDDLE, *EXPERTS, *UNTIED], [*TENSOR, *zero(3), *BF16, *REDUCE, *SPARSE, *CHUNKS, *WHOLE]),
    ("gpt", 4, MIDDLE, [*SEQUENCE, "parallel.context=2", *zero(2), *OFFLOAD, *REDUCE, *SPARSE]),
    ("gpt", 1, MIDDLE, [*SELECTIVE, *WHOLE]),
    ("gpt", 1, [*ROOM, *PREFIX], SPARSE),
    ("gpt", 1, [], REDUCE),
    ("gpt", 4, MIDDLE, [*FOLDED, "parallel.context=2", *zero(1), *OFFLOAD, *REDUCE, *SELECTIVE,
                                     "parallel.recompute_every=2"]),
    ("gpt", 2, [*ROOM, *PREFIX, *EXPERTS], FOLDED),
    ("bart", 2, [], [*FOLDED, *BF16]),
    ("bert", 2, FASTER, FOLDED),
    ("t5", 1, [], BF16),
    ("gpt", 2, [*MIDDLE, *EXPERTS, *UNTIED], [*SPREAD, *zero(1), *REDUCE, *SPARSE]),
    ("bart", 2, [*PREFIX, *EXPERTS], SPREAD),
    ("bart", 2, EXPERTS, SPREAD),
    ("t5", 2, UNTIED, ["parallel.pipeline=2", *zero(1), *OFFLOAD, *REDUCE, *SPARSE, *WHOLE]),
    ("bart", 1, [*PREFIX, *EXPERTS], [*zero(2), *OFFLOAD, *BF16, *REDUCE, *SELECTIVE, *CHUNKS, *WHOLE]),
    ("bart", 1, EXPERTS, [*zero(1), *OFFLOAD, *REDUCE, *SELECTIVE, "parallel.recompute_every=2", *CHUNKS, *WHOLE]),
    ("bart", 2, [], zero(2)),
    ("t5", 2, [*GAPS, *UNTIED], [*SEQUENCE, *zero(3), *BF16, *REDUCE, *SPARSE, *CHUNKS, *WHOLE]),
    ("bart", 2, [*GAPS, *EXPERTS], [*SPREAD, *zero(2), *SELECTIVE]),
    ("t5", 2, GAPS, [*FOLDED, *zero(1), *OFFLOAD]),
    ("bart", 4, GAPS, [*TENSOR, *SPARSE]),
    ("bart", 1, ["objective.name=span_corruption"], WHOLE),
    ("bert", 1, FASTER, [*zero(1), *OFFLOAD, *REDUCE, *SPARSE, *WHOLE]),
    ("clip", 4, ["objective.name=siglip"], [*SEQUENCE, *zero(2), *REDUCE, *SPARSE]),
    ("clip", 1, ["objective.name=siglip", "optimizer.lr=5e-4"], [*BF16, *SELECTIVE, *WHOLE]),
    ("clip", 1, ["objective.name=siglip"], [*zero(1), *OFFLOAD, *REDUCE]),
    ("clip", 2, ["objective.name=siglip"], zero(3)),
    ("clip", 1, [], [*zero(1), *OFFLOAD, *REDUCE, *SELECTIVE]),
    ("clip", 2, [], SPARSE),
]  # fmt: skip


@pytest.mark.parametrize(("family", "ranks", "model", "extra"), CASES, ids=str)
def test_the_curve_is_the_same(family, ranks, model, extra, runs):
    options = [*SHORT, "optimizer.lr=1e-3", *model]
    expected, found = runs(family, 1, options), runs(family, ranks, [*options, *extra])
    check_reference(expected, learnt=0.02)
    if BF16[0] in extra:
        assert found.losses == pytest.approx(expected.losses, rel=2e-2)
    else:
        check_same(found, expected)
