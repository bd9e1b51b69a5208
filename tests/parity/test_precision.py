"""In which number formats a step really computes, keeps state and speaks to other ranks."""

from __future__ import annotations

import pytest
import torch

from pretrain.checkpoint.manifest import read_manifest
from pretrain.training.metrics import read_metrics
from tests.helpers.ranks import run_ranks
from tests.helpers.recipes import GPT

pytestmark = pytest.mark.slow

MANY = 1000  # elements: fewer are norms, losses and counts, not gradients


def reduced_bytes(info, values: dict) -> dict[str, int]:
    """Bytes that one step's reductions of gradients put on the wire, by number format."""
    from collections import Counter

    from torch.utils._python_dispatch import TorchDispatchMode

    counted: Counter[str] = Counter()

    class Wire(TorchDispatchMode):
        """Sees every collective as torch dispatches it, whoever asked for it."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            if name.startswith("c10d.") and "reduce" in name:
                sent = args[1] if "scatter" in name else args[0]
                for tensor in torch.utils._pytree.tree_leaves(sent):
                    if isinstance(tensor, torch.Tensor) and tensor.numel() > MANY:
                        counted[str(tensor.dtype)] += tensor.nbytes
            return function(*args, **(kwargs or {}))

    engine, batches = prepared(info, values)
    with Wire():
        engine.train_step(batches, 1, 1e-3)
    return dict(counted)


def formats(info, values: dict) -> dict:
    """Number formats inside a step, by what they are of; and how much of a norm's output is that of fp32, rounded."""
    import torch.nn.functional as F

    from pretrain.models.blocks import Norm

    engine, batches = prepared(info, values)
    seen: dict[str, set] = {}

    def note(what, *tensors):
        seen.setdefault(what, set()).update(str(tensor.dtype) for tensor in tensors)

    def watch(module, inputs, output):
        note("activations", inputs[0], output)
        note("norm weights on use", module.weight)
        x = inputs[0].float()
        exact = F.layer_norm(x, (x.shape[-1],), module.weight.float(), module.bias.float(), module.epsilon)
        statistics.append(float((exact.to(output.dtype) == output).float().mean()))  # one rounding, at the end

    statistics: list[float] = []
    for module in engine.stage.modules():
        if isinstance(module, Norm):
            module.register_forward_hook(watch)
    losses, clip = engine.objective.losses, engine.step_hooks.clip

    def noted_loss(logits, targets):
        note("logits", logits)
        found = losses(logits, targets)
        note("loss", *found.values())
        return found

    def noted_clip():
        note("gradients", *(fragment.tensor for fragment in engine.state.gradients()))
        clip()

    engine.objective.losses, engine.step_hooks.clip = noted_loss, noted_clip
    engine.train_step(batches, 1, 1e-3)
    note("master weights", *(fragment.tensor for fragment in engine.state.fragments("weight")))
    for kind in ("exp_avg", "exp_avg_sq"):
        note("moments", *(fragment.tensor for fragment in engine.state.fragments(kind)))
    note("stored", *(fragment.tensor for fragment in engine.owned_fragments()))
    return {"seen": seen, "statistics": min(statistics)}


def prepared(info, values: dict):
    """An engine on these ranks and the micro-batches of this rank."""
    from parallel.layout import Layout
    from parallel.process_groups import build_groups
    from parallel.ranks.rendezvous import join
    from pretrain.config.run_config import config_from
    from pretrain.training.build_engine import build_engine

    config = config_from(values, "test")
    join(info)
    groups = build_groups(Layout.of(config.parallel, info.world_size))
    engine = build_engine(config, groups, torch.device("cpu"))
    generator = torch.Generator().manual_seed(groups.coordinates.dp)
    size = (config.parallel.micro_batch, config.model.sequence_length + 1)
    batches = [{"tokens": torch.randint(config.model.vocab_size, size, generator=generator)}
               for _ in range(engine.accumulation)]
    return engine, batches


def values(reduce: str = "fp32", **parallel) -> dict:
    # untied: the two copies of a tied table in a pipeline are summed in fp32 whatever `reduce` says
    return {**GPT, "data": {"train": "unused"}, "precision": {"compute": "bf16", "reduce": reduce},
            "model": {**GPT["model"], "tied_head": False},
            "parallel": {"micro_batch": 2, "global_batch": 8, **parallel}}


@pytest.mark.parametrize("parallel", [{"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3},
                                      {"zero_stage": 1, "pipeline": 2}], ids=str)  # fmt: skip
def test_gradients_travel_in_the_format_that_is_asked_for(parallel):
    ranks = 2 * parallel.get("pipeline", 1)
    for in_fp32, in_bf16 in zip(run_ranks(reduced_bytes, ranks, values("fp32", **parallel)),
                                run_ranks(reduced_bytes, ranks, values("compute", **parallel)), strict=True):
        assert set(in_fp32) == {"torch.float32"}
        assert set(in_bf16) == {"torch.bfloat16"}
        assert in_fp32["torch.float32"] == 2 * in_bf16["torch.bfloat16"]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_what_stays_fp32_is_what_the_table_says(zero_stage):
    first, second = run_ranks(formats, 2, values(zero_stage=zero_stage))
    assert {what: first["seen"][what] | second["seen"][what] for what in first["seen"]} == {
        "activations": {"torch.bfloat16"}, "norm weights on use": {"torch.bfloat16"}, "logits": {"torch.bfloat16"},
        "loss": {"torch.float32"}, "gradients": {"torch.float32"}, "master weights": {"torch.float32"},
        "moments": {"torch.float32"}, "stored": {"torch.float32"},
    }
    assert min(first["statistics"], second["statistics"]) > 0.99, "a norm rounded its mean or variance"


def poisoned(info, values: dict) -> tuple[str, bool]:
    """What a step says when one rank alone has a gradient that is NaN, and whether every weight stayed as it was."""
    from common.errors import NotFinite

    engine, batches = prepared(info, values)
    if info.rank == info.world_size - 1:
        next(iter(engine.slots.values())).parameter.register_hook(lambda gradient: gradient * float("nan"))
    before = [(fragment.tensor, fragment.tensor.clone()) for fragment in engine.state.fragments("weight")]
    try:
        engine.train_step(batches, 1, 1e-3)
    except NotFinite as error:
        return str(error), all(torch.equal(tensor, kept) for tensor, kept in before)
    return "nothing", False


@pytest.mark.parametrize("parallel", [{"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3},
                                      {"tensor": 2}, {"context": 2, "zero_stage": 1}], ids=str)  # fmt: skip
def test_a_gradient_that_is_not_finite_stops_every_rank_before_a_weight_changes(parallel):
    assert run_ranks(poisoned, 2, values(**parallel)) == [("the gradient norm is nan", True)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_step_that_overflows_in_fp16_is_skipped_and_counted(zero_stage, tmp_path, recipe, trainer):
    """A loss scale of 2^32 is far too high; each overflow halves it until steps are taken."""
    overrides = [f"run.dir={tmp_path}", "precision.compute=fp16", f"parallel.zero_stage={zero_stage}", "run.steps=40",
                 "precision.initial_scale_power=32", "checkpoint.every=40"]
    assert trainer.on_gpus(1, recipe, overrides) == 0  # DeepSpeed's CPU accelerator refuses fp16
    records = read_metrics(tmp_path / "metrics.jsonl")
    skipped = [bool(record.get("skipped")) for record in records]
    assert len(records) == 40
    assert skipped[0] and not skipped[-1]
    assert skipped == sorted(skipped, reverse=True), "once the scale fits, no step is skipped"
    assert records[skipped.index(False)]["loss"] == pytest.approx(records[0]["loss"], rel=0.05), "a skipped step learnt"
    assert records[-1]["loss"] < records[0]["loss"] - 0.1
    manifest = read_manifest(tmp_path / "checkpoints" / "step-00000040")
    assert manifest["adam_step"] == skipped.count(False)
