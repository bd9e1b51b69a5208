"""What an objective asks of a model and a dataset, said with numbers; and batches that a model takes."""


import numpy as np
import pytest
import torch
import yaml

from common.errors import ConfigError, UserError
from data_pipeline.batch_plan import BatchPlan
from data_pipeline.corruption.noise_seed import HELDOUT, NoiseSeed
from data_pipeline.loader import Loader, ReadOptions, heldout_batches
from data_pipeline.text.tokenizer import Tokenizer
from data_pipeline.tokens.in_memory_dataset import TextDataset
from data_pipeline.tokens.token_dataset import TokenDataset
from parallel.parameter_plan import draw
from parallel.pipeline_stages import Stage
from parallel.single_rank import single_rank
from parallel.tensor_parallel import TensorParallel
from pretrain.config.run_config import load_config, load_run
from pretrain.models import FAMILIES, family_spec
from pretrain.models.build import layer_list
from pretrain.objectives import make_loss, make_stages
from tests.helpers.recipes import TEXT_VOCAB_SIZE, recipe_of

TEXT_FAMILIES = [family for family in FAMILIES if family != "clip"]  # pictures: tests/unit/pretrain/test_clip.py
CASES = [(family, name) for family in TEXT_FAMILIES for name in family_spec(family).objectives]


@pytest.fixture
def config_of(tmp_path, dataset):
    def make(family, objective, **model):
        content = recipe_of(family)
        length = {"target_length": 32} if family == "t5" else {}
        content = {**content, "run": {"dir": str(tmp_path / "run"), "steps": 1}, "objective": objective,
                   "model": {**content["model"], "vocab_size": TEXT_VOCAB_SIZE, **length, **model},
                   "data": {"train": str(dataset / "train"), "heldout": str(dataset / "heldout")}}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return make


def open_loader(dataset, config, stages=(), *, global_batch=4, micro_batch=2, workers=0, **plan) -> Loader:
    plan = BatchPlan(seed=1, global_batch=global_batch, micro_batch=micro_batch, **plan)
    return Loader(dataset, plan, ReadOptions(config.window_tokens, stages=stages, workers=workers))


def heldout(dataset, config, num_samples=None, stages=()):
    return heldout_batches(dataset, BatchPlan.heldout(2), ReadOptions(config.window_tokens, stages=stages), num_samples)


def problem(path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert len({found.where.partition(" ")[0] for found in caught.value.problems} - {"data.heldout"}) == 1
    return " | ".join(caught.value.problems[0])


@pytest.mark.parametrize(("family", "objective", "model", "told"), [
    ("t5", "span_corruption", {"vocab_size": 512}, "model.vocab_size must be at least 518"),
    ("t5", "span_corruption", {"target_length": 5}, "8: 5 hidden tokens, 2 sentinels and end-of-text of 34 tokens"),
    ("t5", "span_corruption", {"sequence_length": 2}, "set model.sequence_length=3"),
    ("t5", "prefix_lm", {"sequence_length": 1}, "at least 2: one token before the cut and one after"),
    ("t5", "causal_lm", {}, "span_corruption, prefix_lm"),
    ("bart", "denoising", {"sequence_length": 3}, "at least 4"),
    ("bart", "denoising", {"target_length": 16}, "at least 32, the length of the sample"),
    ("bart", "denoising", {"vocab_size": 515}, "512 token ids and 4 ids that the objective keeps for itself"),
    ("bert", "masked_lm", {"sequence_length": 4}, "at least 5"),
    ("bert", "masked_lm", {"segment_types": 1}, "set model.segment_types=2, or model.next_sentence=false"),
    ("gpt", "fill_in_the_middle", {"vocab_size": 518}, "model.vocab_size must be at least 519"),
    ("gpt", "fill_in_the_middle", {"sequence_length": 5}, "at least 6: three sentinels"),
])  # fmt: skip
def test_what_does_not_fit_is_told(family, objective, model, told, config_of):
    assert told in problem(config_of(family, {"name": objective}, **model))


def test_parts_of_masking_add_up(config_of):
    told = problem(config_of("bert", {"name": "masked_lm", "masked_part": 0.8, "random_part": 0.3}))
    assert "set objective.random_part=0.2 or less" in told


def test_target_is_split_over_tensor_ranks(config_of):
    path = config_of("t5", {"name": "span_corruption"}, target_length=9)
    with pytest.raises(ConfigError) as caught:
        load_run(path, ["parallel.tensor=2", "parallel.sequence=true"])
    [found] = caught.value.problems
    assert found.where.startswith("model.target_length")
    assert "set model.target_length to 10" in found.change


@pytest.mark.parametrize(("family", "name"), CASES)
def test_batches_of_every_objective_go_through_the_model(family, name, config_of):
    config = load_config(config_of(family, {"name": name}))
    dataset = TokenDataset.open(config.data.train)
    stages = make_stages(config.objective, config.model, dataset, NoiseSeed(config.run.seed))
    with open_loader(dataset, config, stages) as loader:
        batches = next(loader)
    held = list(heldout(dataset, config, 3, make_stages(config.objective, config.model, dataset, HELDOUT)))
    assert held[1]["weights"][1].sum() == 0 < held[1]["weights"][0].sum()
    with single_rank() as groups:
        tp = TensorParallel(groups, torch.device("cpu"))
        specs = layer_list(config.model, tp)
        stage = Stage(specs, (0, len(specs)))
        loss = make_loss(config.objective, config.model, tp)
        with torch.no_grad():
            for key, parameter in stage.named_global_parameters():
                parameter.copy_(draw(key, tuple(parameter.shape), parameter.plan, 3))
            means = []
            for batch in [*batches, *held]:
                sums, counts = loss.losses(stage.run(loss.inputs(batch)), loss.targets(batch)), loss.counts(batch)
                assert sums.keys() == counts.keys() == loss.terms.keys()
                means.append(float(sum(sums[term] / counts[term] for term in loss.terms)))
        for mean in means:
            assert abs(mean - np.log(TEXT_VOCAB_SIZE)) < 3, "about as good as a guess"


@pytest.mark.parametrize(("family", "name"), CASES)
def test_documents_shorter_than_a_span(family, name, config_of, dataset, tmp_path):
    """Windows run across documents, so even empty ones and single tokens make samples of every objective."""
    config = load_config(config_of(family, {"name": name}))
    tokenizer = Tokenizer.load(dataset / "tokenizer.model")
    short = TextDataset(["", "a", "if", "\n"] * 400, tokenizer)
    assert short.token_counts.max() <= 3
    for seed in (NoiseSeed(1), HELDOUT):
        stages = make_stages(config.objective, config.model, short, seed)
        for batch in heldout(short, config, 8, stages):
            assert batch["weights"].sum() > 0
    with pytest.raises(UserError, match="holds 4 tokens"):
        list(heldout(TextDataset(["", "", "", ""], tokenizer), config))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [("bert", "masked_lm"), ("bart", "denoising")])
def test_corruption_is_the_same_for_any_ranks_workers_and_place_of_resumption(family, name, config_of):
    """Stages travel to worker processes, and a sample is corrupted by its position alone."""
    config = load_config(config_of(family, {"name": name}))
    dataset = TokenDataset.open(config.data.train)

    def take(num_steps, **options):
        stages = make_stages(config.objective, config.model, dataset, NoiseSeed(config.run.seed))
        with open_loader(dataset, config, stages, **options) as loader:
            return [batch for _ in range(num_steps) for batch in next(loader)]

    whole = take(3)
    ranks = [take(3, data_rank=rank, data_ranks=2) for rank in range(2)]
    for found, expected in [(take(2, workers=1, first_position=4), whole[2:]),
                            ([batch for pair in zip(*ranks, strict=True) for batch in pair], whole)]:
        assert all(torch.equal(a[key], b[key]) for a, b in zip(found, expected, strict=True) for key in b)


def test_segment_pairs(config_of):
    """Half of the second segments come from elsewhere, and the frame is where it should be."""
    config = load_config(config_of("bert", {"name": "masked_lm", "mask_ratio": 0.05}))
    dataset = TokenDataset.open(config.data.train)
    stages = make_stages(config.objective, config.model, dataset, NoiseSeed(1))
    with open_loader(dataset, config, stages, global_batch=64, micro_batch=64) as loader, \
            open_loader(dataset, config, global_batch=64, micro_batch=64) as plain:
        not_next_flags = []
        for _ in range(8):
            [batch], [raw] = next(loader), next(plain)
            whole = batch["tokens"].scatter(1, batch["positions"], batch["labels"])
            for row, types, not_next, text in zip(whole, batch["types"], batch["not_next"], raw["tokens"], strict=True):
                cut = int((types == 0).sum()) - 2
                assert [int(row[i]) for i in (0, cut + 1, -1)] == [TEXT_VOCAB_SIZE - 2] + [TEXT_VOCAB_SIZE - 3] * 2
                assert torch.equal(row[1 : cut + 1], text[:cut])
                if not_next == 0:
                    assert torch.equal(row[cut + 2 : -1], text[cut:-1])
                not_next_flags.append(int(not_next))
    assert np.mean(not_next_flags) == pytest.approx(0.5, abs=0.08)


def test_whole_words_follow_the_pieces(config_of):
    config = load_config(config_of("bert", {"name": "masked_lm", "whole_words": True}, next_sentence=False,
                                   sequence_length=128))
    dataset = TokenDataset.open(config.data.train)
    pieces = Tokenizer.load(dataset.folder / "tokenizer.model").pieces()
    stages = make_stages(config.objective, config.model, dataset, NoiseSeed(1))
    with open_loader(dataset, config, stages, global_batch=64, micro_batch=64) as loader:
        [batch] = next(loader)
    broken = words = 0
    whole = batch["tokens"].scatter(1, batch["positions"], batch["labels"])
    for row, positions, weights in zip(whole, batch["positions"], batch["weights"], strict=True):
        chosen = set(positions[weights > 0].tolist())
        for place in range(2, 127):
            if pieces[int(row[place])][:1].isalnum():  # goes on with the word before it
                words += place in chosen or place - 1 in chosen
                broken += (place in chosen) != (place - 1 in chosen)
    assert words > 200
    assert broken == 0
