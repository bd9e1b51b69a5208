"""The promise of the project: the same config gives the same curve on every layout, through `trainyard train`.

fp32: every loss within 1e-5 and every gradient norm within 1e-4, relative, with AdamW, warm-up and clipping: over 24
steps on the core of the layouts, over six on the others (helpers/runs.py says why).
"""

from __future__ import annotations

from itertools import product

import pytest

from tests.helpers.recipes import write_recipe
from tests.helpers.runs import ONE, SHORT, Case, check_reference, check_same, read_run

# Layouts that train the recipe's 24 steps.
CORE = [
    Case(tensor=2, data=2, zero=1, sequence=True), Case(pipeline=2, data=2, zero=1), Case(data=2, zero=3),
    Case(data=2), Case(data=2, zero=2), Case(tensor=2, data=2, zero=3, sequence=True),
    Case(tensor=2, pipeline=2, data=2, zero=1, sequence=True),
]  # fmt: skip
IN_QUICK = CORE[:3]  # over six steps also in `make quick`
LAYOUTS = [  # (tensor, pipeline, data, ZeRO stage), with a tensor degree also with sequence parallelism
    (1, 1, 2, 0), (1, 1, 2, 1), (1, 1, 2, 2), (1, 1, 2, 3),
    (2, 1, 1, 1), (2, 1, 2, 1), (2, 1, 2, 2), (2, 1, 2, 3), (4, 1, 1, 0),
    (1, 2, 1, 0), (1, 2, 1, 1), (1, 2, 2, 1), (1, 4, 1, 1), (2, 2, 1, 1), (2, 2, 2, 1),
]  # fmt: skip
CASES = [Case(tensor=tensor, pipeline=pipeline, data=data, zero=zero, sequence=sequence)
         for tensor, pipeline, data, zero in LAYOUTS for sequence in ((False, True) if tensor > 1 else (False,))]
UNTIED = ("model.tied_head=false",)
# With rotary positions alone a first token's residual comes near zero early on, where the norm amplifies rounding; at a
# half of the rate the weights stay away from there.
LLAMA = ("model.norm=rmsnorm", "model.positions=rotary", "model.activation=swiglu", "model.bias=false",
         "model.kv_heads=4", "model.heads=8", "model.tied_head=false", "model.ffn=96",
         "optimizer.lr=1.5e-3")  # fmt: skip
POST_NORM = ("model.norm_position=post", "model.activation=gelu_tanh")
BF16 = ("precision.compute=bf16",)
slow = pytest.mark.slow


def in_few_micro_batches(case: Case) -> tuple[str, ...]:
    """Two micro-batches a step instead of four, where neither data ranks nor stages share them: half the messages."""
    return ("parallel.micro_batch=4",) if case.data == case.pipeline == 1 else ()


def check(runs, case: Case, extra: tuple[str, ...] = (), steps: tuple[str, ...] = SHORT) -> None:
    expected = runs.reference("gpt", [*steps, *extra])
    if steps == SHORT:
        check_reference(expected, learnt=0.08)
    else:
        check_reference(expected, learnt=0.4, clip_norm=1.0)
    check_same(runs.on(case, "gpt", [*in_few_micro_batches(case), *steps, *extra]), expected)


@slow
@pytest.mark.parametrize("case", CORE, ids=str)
def test_fp32_curve_is_the_same_over_24_steps(case, runs):
    check(runs, case, steps=())


@pytest.mark.parametrize("case", [
    *(pytest.param(case, marks=pytest.mark.quick) for case in IN_QUICK),
    *(pytest.param(case, marks=slow) for case in CASES if case not in CORE),
], ids=str)  # fmt: skip
def test_fp32_curve_is_the_same(case, runs):
    check(runs, case)


@slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_curve_is_the_same_with_an_untied_head(case, runs):
    check(runs, case, UNTIED)


@slow
@pytest.mark.parametrize(("case", "extra"), [
    *product([Case(tensor=2, data=2, zero=1, sequence=True), Case(tensor=2, pipeline=2, zero=1, sequence=True),
              Case(data=2, zero=3)], [LLAMA, POST_NORM]),
    (Case(tensor=4, sequence=True), LLAMA),
    (Case(tensor=2, zero=1, sequence=True), ("model.pad_vocab_to=96",)),  # 512 -> 576 rows; 64 of them are no token's
], ids=str)  # fmt: skip
def test_shapes_of_block(case, extra, runs):
    check(runs, case, extra)


@slow
@pytest.mark.parametrize("case", [Case(pipeline=2, zero=1), Case(pipeline=3)], ids=str)
def test_blocks_that_do_not_divide_into_stages(case, runs):
    check(runs, case, ("model.layers=5",))


@slow
@pytest.mark.parametrize(("case", "extra"), [
    *((case, ()) for case in (
        Case(zero=1), Case(data=2, zero=3), Case(data=2, zero=2), Case(pipeline=2, data=2),
        Case(tensor=2, data=2, zero=1, sequence=True), Case(tensor=2, pipeline=2, zero=1, sequence=True))),
    *((case, ("parallel.offload=optimizer",)) for case in (Case(data=2, zero=3), Case(pipeline=2, data=2, zero=1))),
], ids=str)  # fmt: skip
def test_bf16_curve_is_close(case, extra, runs):
    expected = runs.reference("gpt", BF16)
    assert runs.on(case, "gpt", [*BF16, *extra]).losses == pytest.approx(expected.losses, rel=2e-2)
    in_fp32 = runs.reference("gpt").losses
    assert expected.losses != in_fp32, "bf16 must differ from fp32, and not by much"
    assert expected.losses == pytest.approx(in_fp32, rel=2e-2)


@slow
@pytest.mark.parametrize("case", [
    Case(data=2, zero=1), Case(tensor=2, data=2, zero=2, sequence=True), Case(data=2, zero=3), Case(pipeline=2, zero=1),
], ids=str)  # fmt: skip
def test_offload_changes_nothing(case, runs):
    """The optimizer in host memory, which steps with another implementation of Adam."""
    check(runs, case, ("parallel.offload=optimizer",))


@slow
@pytest.mark.parametrize("case", [Case(data=2, zero=2), Case(data=2, zero=3)], ids=str)
def test_state_in_files_is_state_in_memory(case, tmp_path, runs):
    memory = [*SHORT, "parallel.offload=optimizer"]
    assert curve(runs.on(case, "gpt", [*memory, f"parallel.offload_folder={tmp_path}"])) \
        == curve(runs.on(case, "gpt", memory))


def curve(run) -> list[tuple[float, float]]:
    return list(zip(run.losses, run.norms, strict=True))


@slow
@pytest.mark.gpu
def test_weights_in_host_memory_change_nothing(tmp_path, dataset, trainer):
    """Moves weights out of device memory."""
    recipe, found = write_recipe(tmp_path / "gpt.yaml", dataset), []
    for name, extra in (("plain", ()), ("host", ("parallel.offload=parameters",))):
        overrides = [f"run.dir={tmp_path / name}", *Case(zero=3).overrides, *extra]
        assert trainer.on_gpus(1, recipe, overrides) == 0
        found.append(read_run(tmp_path / name))
    check_same(*found)


@slow
@pytest.mark.parametrize(("case", "extra"), [
    (ONE, ()), (Case(tensor=2, zero=1, sequence=True), ("model.pad_vocab_to=320",)),  # rank 1 holds mostly padding
    (Case(tensor=2), UNTIED), (Case(pipeline=2, zero=1), ()), (Case(data=2, zero=3), UNTIED),
], ids=str)  # fmt: skip
def test_logits_in_chunks_change_nothing(case, extra, runs):
    """Against all logits at once on one rank; 24 does not divide the 64 tokens of a micro-batch."""
    expected = runs.reference("gpt", [*SHORT, *(option for option in extra if "pad_vocab" not in option)])
    check_same(runs.on(case, "gpt", [*SHORT, *extra, "parallel.loss_chunk_tokens=24"]), expected)


@slow
@pytest.mark.parametrize("case", [
    Case(tensor=2, data=2, zero=1, sequence=True), Case(data=2, zero=3), Case(pipeline=2, data=2, zero=1),
], ids=str)  # fmt: skip
def test_recompute_changes_nothing(case, runs):
    """The curve of a layout, with dropout, is that without recompute to the last bit."""
    options = ["run.steps=4", "model.dropout=0.1", "model.attention_dropout=0.1", "model.activation=swiglu"]
    plain = curve(runs.on(case, "gpt", options))
    for mode in (["parallel.recompute=full"], ["parallel.recompute=selective"],
                 ["parallel.recompute=full", "parallel.recompute_every=3"]):
        assert curve(runs.on(case, "gpt", [*options, *mode])) == plain, mode
