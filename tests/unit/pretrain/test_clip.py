"""CLIP: its pixels, its losses by hand, its facts, what it refuses. Its towers are compared in test_convert.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.image_text.pair_dataset import PairsDataset
from data_pipeline.image_text.pair_writer import RawPair, write_pairs
from launchers.run_folder.status import read
from parallel.gradient_cache import DataRows, GradientCache, surrogate
from parallel.parameter_plan import draw
from parallel.pipeline_stages import Stage
from parallel.tensor_parallel import TensorParallel
from pretrain.config.run_config import config_from
from pretrain.models import family_spec
from pretrain.models.clip.modules import layers
from pretrain.models.clip.spec import CLIPConfig
from pretrain.objectives.contrastive import Contrastive, SigLIP
from pretrain.objectives.objective import ObjectiveConfig
from pretrain.training.metrics import read_metrics
from tests.helpers.ranks import run_ranks, train_on
from tests.helpers.recipes import CLIP, write_recipe

SHARD = TensorParallel(None, torch.device("cpu"))
ROWS = DataRows()


def small(**changes) -> CLIPConfig:
    return CLIPConfig(**{**CLIP["model"], "logit_bias": None, **changes})


def objective_of(kind):
    return kind(ObjectiveConfig(name=kind.name), small(), SHARD)


def in_one_process(info, work: str):
    """Megatron-core's embedding asks for its groups, so even a single rank needs a world."""
    from parallel.layout import Layout
    from parallel.process_groups import build_groups
    from parallel.ranks.rendezvous import join

    join(info)
    build_groups(Layout())
    return globals()[work]()


def built(config: CLIPConfig) -> Stage:
    specs = layers(config, SHARD)
    stage = Stage(specs, (0, len(specs)))
    with torch.no_grad():
        for name, parameter in stage.named_global_parameters():
            parameter.copy_(draw(name, tuple(parameter.shape), parameter.plan, 3))
    return stage


def of_pixels() -> tuple[bool, int, int, int]:
    config = small(logit_bias=-10.0)
    stage = built(config)
    whole = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    normalised = (whole.permute(0, 2, 3, 1) / 255 - mean) / std
    rest = (torch.zeros(3, 15, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    real = normalised.permute(0, 3, 1, 2)
    same = torch.allclose(stage.run((whole, *rest))[0], stage.run((real, *rest))[0], atol=1e-5)
    count = sum(parameter.numel() for parameter in stage.parameters())
    return same, count, family_spec("clip").parameter_count(config), len(stage.run((whole, *rest)))


def test_pixels_are_normalised_and_parameters_counted():
    same, built_count, said, num_outputs = run_ranks(in_one_process, 1, "of_pixels")[0]
    assert same
    assert built_count == said
    assert num_outputs == 3


def unit_vectors(count: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_contrastive_by_hand():
    image, text = 10 * unit_vectors(6, 0), unit_vectors(6, 1)
    logits = image @ text.t()
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.t(), torch.arange(6))) / 2
    found = objective_of(Contrastive).losses((image, text), (torch.ones(6),), ROWS)["contrastive"] / 6
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_siglip_by_hand():
    image, text = 10 * unit_vectors(5, 0), unit_vectors(5, 1)
    expected = 0.0
    for i in range(5):
        for j in range(5):
            logit = float(image[i] @ text[j]) - 10.0
            expected += math.log1p(math.exp(-logit if i == j else logit))
    found = objective_of(SigLIP).losses((image, text, torch.full((5,), -10.0)), (torch.ones(5),), ROWS)["siglip"]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", [Contrastive, SigLIP])
def test_fillers_are_nobody(objective):
    image, text = 10 * unit_vectors(6, 0), unit_vectors(6, 1)
    weights = torch.tensor([1.0, 1, 1, 1, 0, 0])
    (found,), (expected,) = (objective_of(objective).losses((image[:n], text[:n]), (weights[:n],), ROWS).values()
                             for n in (6, 4))
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_a_surrogate_has_the_cached_gradient():
    parts = [(torch.randn(2, 3), torch.randn(2)), (torch.randn(4, 3), torch.randn(4))]
    cache = GradientCache(parts)
    (cache.outputs[0].square().sum() * cache.outputs[0].mean()).backward()
    first, second = cache.gradients()
    assert torch.equal(second[1], torch.zeros(4))
    outputs = tuple(tensor.clone().requires_grad_() for tensor in parts[1])
    surrogate(outputs, second).backward()
    assert torch.equal(outputs[0].grad, cache.outputs[0].grad[2:])
    assert torch.equal(first[0], cache.outputs[0].grad[:2])


def largest_scale(info, stage: int) -> list[float]:
    """The log of the scale after each of three steps that pull it upwards, from a start just below its bound."""
    from parallel.layout import Layout
    from parallel.process_groups import build_groups
    from parallel.ranks.rendezvous import join
    from pretrain.training.build_engine import build_engine

    values = {**CLIP, "model": {**CLIP["model"], "init_temperature": 0.0101}, "data": {"train": "unused"},
              "parallel": {"micro_batch": 4, "global_batch": 8, "zero_stage": stage}}
    config = config_from(values, "test")
    join(info)
    groups = build_groups(Layout.of(config.parallel, info.world_size))
    engine = build_engine(config, groups, torch.device("cpu"))
    batches = [{"pixels": torch.zeros(4, 3, 16, 16, dtype=torch.uint8), "ends": torch.tensor([3, 3, 3, 3]),
                "tokens": torch.arange(4)[:, None].repeat(1, 15)}] * (2 // info.world_size)
    found = []
    for step in range(1, 4):
        for name, _, mean in engine.state.fragments("exp_avg"):
            if name == "scale.logit_scale":
                mean.fill_(-1.0)  # a strong pull upwards
        engine.train_step(batches, step, 1e-3)
        found += [float(tensor) for name, _, tensor in engine.state.fragments("weight") if name == "scale.logit_scale"]
    engine.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (2, 3)])
def test_the_scale_stays_at_most_100(ranks, stage):
    values = [value for found in run_ranks(largest_scale, ranks, stage) for value in found]
    assert len(values) >= 3
    assert values == pytest.approx([math.log(100)] * len(values), rel=1e-6)


@pytest.mark.parametrize(("changes", "where"), [
    ({"patch_size": 5}, "model.patch_size"), ({"image_heads": 3}, "model.image_heads"),
    ({"text_heads": 5}, "model.text_heads"),
])  # fmt: skip
def test_shapes_that_cannot_be(changes, where):
    assert [problem[0] for problem in family_spec("clip").problems(small(**changes))] == [where]


def test_a_tensor_degree_that_does_not_divide_names_both_towers():
    parallel = {"micro_batch": 4, "global_batch": 8, "tensor": 3}
    config = config_from({**CLIP, "data": {"train": "unused"}, "parallel": parallel}, "test")
    wheres = [problem.where for problem in config.problems(3)]
    assert "model.image_heads, model.text_heads" in wheres


@pytest.fixture(scope="module")
def damaged(shapes, tmp_path_factory):
    """A folder of pairs of which four cannot be used."""
    good = PairsDataset.open(shapes / "train", 24)
    pairs = []
    for number in range(60):
        image, caption = good.pair(number)
        content = {7: b"not an image", 21: image[:90]}.get(number, image)
        pairs.append(RawPair(f"pair {number}", ".png", content, {33: " ", 50: ""}.get(number, caption)))
    folder = tmp_path_factory.mktemp("damaged")
    write_pairs(pairs, good.tokenizer, folder / "train", split="train", inputs="four of 60 damaged")
    return folder


SMALL = ["run.steps=15", "parallel.micro_batch=2", "parallel.global_batch=4", "data.heldout=null"]


def unusable_of(folder) -> list[int]:
    return [record["data/unusable"] for record in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def unusable_alone(damaged, tmp_path_factory) -> list[int]:
    """The count after each step of a run on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = write_recipe(folder / "recipe.yaml", damaged, CLIP)
    assert train_on(1, recipe, [f"run.dir={folder / 'run'}", "data.max_bad_fraction=0.5", *SMALL]) == [0]
    assert "passed over" in (folder / "run" / "logs" / "train.log").read_text(encoding="utf-8")
    return unusable_of(folder / "run")


def test_a_run_counts_what_it_passes_over(unusable_alone):
    """An epoch of 60 pairs has gone by, so all four were met."""
    assert unusable_alone == sorted(unusable_alone)
    assert unusable_alone[-1] == 4


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["parallel.tensor=2"]])
def test_the_count_is_the_same_on_another_layout_and_goes_on_after_a_resume(extra, damaged, unusable_alone, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", damaged, CLIP)
    overrides = [f"run.dir={tmp_path / 'run'}", "data.max_bad_fraction=0.5", *SMALL]
    # the resume has to carry a count and to meet more
    stop = next(step for step, number in enumerate(unusable_alone, start=1) if 0 < number < unusable_alone[-1])
    assert train_on(2, recipe, [*overrides, *extra, f"run.steps={stop}"]) == [0, 0]
    assert unusable_of(tmp_path / "run") == unusable_alone[:stop]
    assert train_on(1, recipe, overrides) == [0]
    assert unusable_of(tmp_path / "run") == unusable_alone


def test_a_fraction_of_zero_ends_the_run_at_the_first(damaged, unusable_alone, tmp_path):
    """On every layout at the same step, with the shard and the sample named, and as damaged data."""
    first = next(step for step, count in enumerate(unusable_alone, start=1) if count)
    for ranks in (1, 2):
        recipe = write_recipe(tmp_path / "recipe.yaml", damaged, CLIP)
        codes = train_on(ranks, recipe, [f"run.dir={tmp_path / f'run{ranks}'}", "data.max_bad_fraction=0", *SMALL])
        assert codes == [65] * ranks
        assert unusable_of(tmp_path / f"run{ranks}") == [0] * (first - 1)
        said = read(tmp_path / f"run{ranks}").reason
        assert f"step {first}: {unusable_alone[first - 1]:,} of the {4 * first:,} samples" in said
        assert "shard-000000.tar (" in said and "Some: " in said


def test_heldout_pairs_that_cannot_be_used_are_told(damaged, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", damaged, CLIP)
    overrides = [f"run.dir={tmp_path / 'run'}", "data.max_bad_fraction=0.5", *SMALL, "run.steps=1",
                 f"data.heldout={damaged / 'train'}", "log.evaluate_every=1", "log.evaluate_samples=40"]
    assert train_on(2, recipe, overrides) == [0, 0]
    records = read_metrics(tmp_path / "run" / "evaluations.jsonl")
    assert [(record["data/unusable"], record["data/samples"]) for record in records] == [(3, 40)] * 2
    told = (tmp_path / "run" / "logs" / "train.log").read_text(encoding="utf-8")
    assert "without 3 of 40 samples that cannot be used (7.5%)" in told
