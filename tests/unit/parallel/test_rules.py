"""Each rule with a case that breaks it, the words it must say, and proof that its remedy is one."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from parallel.config import ParallelConfig, PrecisionConfig
from parallel.layout import Layout, legal
from parallel.rules.model_traits import ModelTraits
from parallel.rules.rule import nearest_multiples
from parallel.rules.table import RULES, problems

MODEL = ModelTraits(layers=4, heads=4, kv_heads=4, hidden=256, ffn=1024, vocab_size=4096, sequence_length=256)


def found(world_size=8, compute="fp32", model=None, **parallel):
    """The problems of a tiny run with these changes."""
    parallel = ParallelConfig(**{"micro_batch": 2, "global_batch": 32, **parallel})
    precision = PrecisionConfig(compute=compute)
    return list(problems(parallel, precision, world_size, replace(MODEL, **(model or {}))))


# rule, what is asked, where it is said, words of the message, a change that the message names
NEGATIVE = [
    ("world-divides", {"tensor": 4, "pipeline": 2, "world_size": 12}, "parallel", "8 or 16 ranks", {"world_size": 16}),
    ("world-divides", {"tensor": 4, "world_size": 2}, "parallel", "start 4 ranks", {"world_size": 4}),
    ("tensor-heads", {"tensor": 4, "model": {"heads": 6, "kv_heads": 4}}, "model.heads", "4 or 8", {"tensor": 2}),
    ("tensor-kv-heads", {"tensor": 4, "model": {"kv_heads": 2}}, "model.kv_heads", "one of 1, 2", {"tensor": 2}),
    ("tensor-ffn", {"tensor": 4, "model": {"ffn": 1022}}, "model.ffn", "1020 or 1024", {"model": {"ffn": 1024}}),
    ("tensor-vocab", {"tensor": 4, "model": {"vocab_size": 4097}}, "model.vocab_size", "model.pad_vocab_to=4",
     {"model": {"vocab_size": 4100}}),
    ("tensor-expert-ffn", {"tensor": 4, "model": {"experts": 4, "expert_ffn": 94}}, "model.expert_ffn", "92 or 96",
     {"model": {"experts": 4, "expert_ffn": 96}}),
    ("tensor-shared-expert-ffn", {"tensor": 4, "model": {"experts": 4, "shared_expert_ffn": 6}},
     "model.shared_expert_ffn", "one of 1, 2", {"tensor": 2}),
    ("expert-needs-experts", {"expert": 2}, "parallel.expert", "model.experts to a multiple of 2", {"expert": 1}),
    ("expert-divides", {"expert": 4, "model": {"experts": 6}}, "model.experts",
     "one of 1, 2, or model.experts to 4 or 8", {"model": {"experts": 8}}),
    ("expert-data", {"expert": 8, "tensor": 2, "model": {"experts": 8}}, "parallel.expert",
     "one of 1, 2, 4, or start 16", {"expert": 4, "model": {"experts": 8}}),
    ("expert-data", {"expert": 4, "world_size": 6, "model": {"experts": 8}, "global_batch": 24}, "parallel.expert",
     "6 data ranks", {"expert": 2, "model": {"experts": 8}}),
    ("expert-zero", {"expert": 2, "zero_stage": 3, "model": {"experts": 8}}, "parallel.zero_stage", "zero_stage=2",
     {"zero_stage": 2, "model": {"experts": 8}}),
    ("sequence-needs-tensor", {"sequence": True}, "parallel.sequence", "one of 2, 4", {"tensor": 2}),
    ("sequence-divides", {"sequence": True, "tensor": 4, "model": {"sequence_length": 250}}, "model.sequence_length",
     "248 or 252", {"model": {"sequence_length": 252}}),
    ("target-divides", {"sequence": True, "tensor": 4, "model": {"target_length": 114}}, "model.target_length",
     "set model.target_length to 116", {"model": {"target_length": 116}}),
    ("sequence-divides", {"context": 4, "model": {"sequence_length": 250}}, "model.sequence_length",
     "250 tokens split over context=4 ranks", {"context": 1}),
    ("sequence-divides", {"context": 2, "sequence": True, "tensor": 4, "model": {"sequence_length": 250}},
     "model.sequence_length", "a multiple of 8 tokens | set model.sequence_length to 248 or 256, or "
     "parallel.sequence=false", {"sequence": False}),
    ("context-supported", {"context": 2, "model": {"why_no_context": "two towers"}}, "parallel.context", "two towers",
     {"context": 1}),
    ("context-heads", {"context": 4, "model": {"heads": 6, "kv_heads": 6}}, "model.heads", "parallel.context to 1 or 2",
     {"context": 2}),
    ("context-heads", {"context": 4, "tensor": 2}, "model.heads", "4 attention heads over tensor=2 x context=4 ranks",
     {"model": {"heads": 8, "kv_heads": 8}}),
    ("context-kv-heads", {"context": 4, "model": {"kv_heads": 2}}, "model.kv_heads", "or model.kv_heads to 4",
     {"model": {"kv_heads": 4}}),
    ("world-divides", {"tensor": 2, "context": 2, "world_size": 6}, "parallel", "tensor=2 x context=2 x pipeline=1",
     {"world_size": 8}),
    ("pipeline-supported", {"pipeline": 2, "model": {"pipeline_supported": False, "why_no_pipeline": "two towers"}},
     "parallel.pipeline", "two towers", {"pipeline": 1}),
    ("pipeline-blocks", {"pipeline": 8}, "parallel.pipeline", "4 or less", {"pipeline": 4}),
    ("pipeline-blocks", {"pipeline": 4, "schedule": "dualpipev"}, "parallel.pipeline", "set parallel.pipeline to 2",
     {"pipeline": 2}),
    ("schedule-needs-pipeline", {"schedule": "dualpipev"}, "parallel.schedule", "parallel.pipeline=2", {"pipeline": 2}),
    ("dualpipev-batch", {"schedule": "dualpipev", "pipeline": 2, "global_batch": 16}, "parallel.global_batch",
     "2 micro-batches a step", {"global_batch": 32}),
    ("pipeline-zero", {"pipeline": 2, "zero_stage": 2}, "parallel.zero_stage", "zero_stage=1", {"zero_stage": 1}),
    ("pipeline-zero", {"pipeline": 2, "zero_stage": 3}, "parallel.zero_stage", "DeepSpeed", {"pipeline": 1}),
    ("batch-divides", {"global_batch": 40}, "parallel.global_batch", "32 or 48, or parallel.micro_batch to 1 or 5",
     {"global_batch": 48}),
    ("batch-divides", {"global_batch": 40}, "parallel.global_batch", "multiple of 16", {"micro_batch": 5}),
    ("batch-divides", {"global_batch": 12}, "parallel.global_batch", "to 16", {"global_batch": 16}),
    ("batch-divides", {"global_batch": 31, "world_size": None}, "parallel.global_batch", "30 or 32",
     {"global_batch": 30}),
    ("fp8", {"compute": "fp8"}, "precision.compute", "set precision.compute=bf16", {"compute": "bf16"}),
    ("offload-zero", {"offload": "optimizer"}, "parallel.offload", "zero_stage=1", {"zero_stage": 1}),
    ("offload-zero", {"offload": "parameters"}, "parallel.offload", "without a word", {"zero_stage": 3}),
    ("offload-folder", {"offload_folder": "/nvme"}, "parallel.offload_folder", "/nvme with offload=none",
     {"offload_folder": ""}),
    ("offload-parameters", {"offload": "parameters", "zero_stage": 2}, "parallel.offload", "offload=optimizer",
     {"offload": "optimizer"}),
    ("offload-parameters-pipeline", {"offload": "parameters", "zero_stage": 3, "pipeline": 2}, "parallel.offload",
     "at stage 3 alone", {"pipeline": 1}),
    ("loss-chunks", {"loss_chunk_tokens": 256, "model": {"predicts_tokens": False}}, "parallel.loss_chunk_tokens",
     "compares samples", {"loss_chunk_tokens": 0}),
    ("recompute-every", {"recompute_every": 2}, "parallel.recompute_every", "recompute=full or selective",
     {"recompute": "selective"}),
    ("recompute-blocks", {"recompute": "full", "recompute_every": 9}, "parallel.recompute_every", "4 or less",
     {"recompute_every": 4}),
    ("fp16-zero", {"compute": "fp16"}, "parallel.zero_stage", "zero_stage=1", {"zero_stage": 1}),
]


@pytest.mark.parametrize(("name", "asked", "where", "words", "change"), NEGATIVE)
def test_negative_case(name, asked, where, words, change):
    rule = next(rule for rule in RULES if rule.name == name)
    mine = [problem for problem in found(**asked) if problem[0] == rule.where]
    assert len(mine) == 1
    assert mine[0][0] == where
    assert words in " | ".join(mine[0])
    assert all(text and text == text.strip() for text in mine[0])
    assert not [problem for problem in found(**{**asked, **change}) if problem[0] == where], "the remedy is none"


def test_every_rule_has_a_negative_case():
    assert {rule.name for rule in RULES} == {case[0] for case in NEGATIVE}
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_several_broken_rules_are_all_told():
    wheres = [problem[0] for problem in found(tensor=3, pipeline=8, zero_stage=3, sequence=True, compute="fp16")]
    assert wheres == ["parallel", "model.heads", "model.kv_heads", "model.ffn", "model.vocab_size",
                      "model.sequence_length", "parallel.pipeline", "parallel.zero_stage"]


def test_tiny_runs_on_every_layout_of_up_to_8_ranks_that_it_promises():
    for layout in (layout for world_size in (1, 2, 4, 8) for layout in legal(world_size)):
        if layout.tensor * layout.context <= 4 and layout.pipeline <= 4:
            for zero_stage in (0, 1) if layout.pipeline > 1 else (0, 1, 2, 3):
                assert found(layout.world_size, tensor=layout.tensor, context=layout.context,
                             pipeline=layout.pipeline, sequence=layout.tensor > 1, zero_stage=zero_stage) == []


@given(world_size=st.integers(1, 512), tensor=st.integers(1, 12), context=st.integers(1, 4),
       pipeline=st.integers(1, 12), micro_batch=st.integers(1, 40), global_batch=st.integers(1, 5000),
       zero_stage=st.integers(0, 3), sequence=st.booleans(), expert=st.integers(1, 12), experts=st.integers(0, 40))
def test_no_problem_means_that_the_numbers_work(world_size, experts, **parallel):
    config = ParallelConfig(**parallel)
    model = replace(MODEL, experts=experts)
    told = list(problems(config, PrecisionConfig(), world_size, model))  # never raises, whatever the numbers
    if not told:
        layout = Layout.of(config, world_size)
        assert layout.world_size == world_size
        assert config.global_batch % (config.micro_batch * layout.data) == 0


@given(number=st.integers(1, 10**6), unit=st.integers(1, 10**4))
def test_nearest_multiples_enclose(number, unit):
    near = nearest_multiples(number, unit)
    assert near
    assert all(multiple > 0 and multiple % unit == 0 and abs(multiple - number) <= unit for multiple in near)


@pytest.mark.parametrize(("field", "value"), [
    ("tensor", 0), ("pipeline", -1), ("zero_stage", 4), ("micro_batch", 0), ("global_batch", 0), ("tensor", 2.0),
    ("tensor", "2"), ("tensor", True), ("sequence", 1), ("recompute", "some"), ("micro_batch", None)])
def test_single_fields_are_strict(field, value):
    with pytest.raises(ValidationError):
        ParallelConfig(**{"micro_batch": 1, "global_batch": 1, field: value})


def test_configs_are_frozen_and_closed():
    config = ParallelConfig(micro_batch=1, global_batch=1)
    with pytest.raises(ValidationError, match="frozen"):
        config.tensor = 2
    with pytest.raises(ValidationError, match="tensr"):
        ParallelConfig(micro_batch=1, global_batch=1, tensr=2)
