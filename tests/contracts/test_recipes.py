"""Every recipe can be run as it is, on the ranks it names, and is the model it claims to be."""

import re
from pathlib import Path

import pytest

from pretrain.config.run_config import load_config
from pretrain.models import FAMILIES

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if "clusters" not in path.parts)

# Exact counts, of the released checkpoints with padding left out: openai-community/gpt2, meta-llama, google-t5/t5-*,
# google/t5-v1_1-*, facebook/bart-*, google-bert/bert-*-uncased with its heads for pretraining, FacebookAI/roberta-base.
PUBLISHED = {
    "gpt/gpt1-117m": 116_534_784,
    "gpt/gpt2-124m": 124_439_808,
    "gpt/gpt2-1.5b": 1_557_611_200,
    "gpt/llama-8b": 8_030_261_248,
    "gpt/llama-70b": 70_553_706_496,
    "t5/small": 60_506_624,
    "t5/base": 222_903_552,
    "t5/large": 737_668_096,
    "t5/3b": 2_851_598_336,
    "t5/11b": 11_307_321_344,
    "t5/v1.1-small": 76_961_152,
    "t5/v1.1-base": 247_577_856,
    "bart/base": 139_420_416,
    "bart/large": 406_291_456,
    "bert/base": 110_106_428,
    "bert/large": 336_226_108,
    "bert/roberta-base": 124_697_433,
    "moe/switch-base-8": 619_339_008,
    "moe/mixtral-8x7b": 46_702_792_704,
}
PUBLISHED_CLIP = {  # openai/clip-vit-*, laion/CLIP-ViT-H-14-laion2B-s32B-b79K
    "vit-b-32": 151_277_313, "vit-b-16": 149_620_737, "vit-l-14": 427_616_513, "vit-l-14-336": 427_944_193,
    "vit-h-14": 986_109_441,
}  # fmt: skip
# Forward of one pair, multiply and add counted as two, of OpenCLIP's model profile.
CLIP_GFLOPS = {"vit-b-32": 14.78, "vit-b-16": 41.09, "vit-l-14": 175.33, "vit-l-14-336": 395.22, "vit-h-14": 381.68}
GPT3_SHAPES = {  # Brown et al. 2020, table 2.1: name, layers, width, tokens in a step; two widths as in the recipes
    "125m": (12, 768, 0.5e6), "350m": (24, 1024, 0.5e6), "760m": (24, 1536, 0.5e6), "1.3b": (24, 2048, 1e6),
    "2.7b": (32, 2560, 1e6), "6.7b": (32, 4096, 2e6), "13b": (40, 5120, 2e6), "175b": (96, 12288, 3.2e6),
}


def named_ranks(path: Path) -> list[int]:
    """The numbers of ranks in the recipe's first line: `for 64 ranks` or `for 1 to 8 ranks`."""
    first, last = re.search(r"for (?:(\d+) to )?(\d+) ranks", path.read_text().partition("\n")[0]).groups()
    return [int(last)] if first is None else [int(first), int(last)]


def parameters(name: str) -> int:
    config = load_config(CONFIGS / f"{name}.yaml")
    return config.spec.parameter_count(config.model)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe_is_legal_on_the_ranks_it_names(path):
    config = load_config(path)
    for world_size in named_ranks(path):
        assert config.problems(world_size) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_run_folder_is_named_after_the_recipe(path):
    assert load_config(path).run.dir in (f"runs/{path.stem}", f"runs/{path.parent.name}-{path.stem}")


def test_run_folders_are_different():
    folders = [load_config(path).run.dir for path in RECIPES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameters_are_the_published_ones(name, count):
    assert parameters(name) == count


@pytest.mark.parametrize(("name", "count"), PUBLISHED_CLIP.items())
def test_clip_is_the_published_one(name, count):
    config = load_config(CONFIGS / "clip" / f"{name}.yaml")
    assert parameters(f"clip/{name}") == count
    flops = config.spec.flops_per_unit(config.model, config.model.sequence_length) / 3e9
    assert flops == pytest.approx(CLIP_GFLOPS.get(name, flops), rel=5e-3)


@pytest.mark.parametrize(("size", "shape"), GPT3_SHAPES.items())
def test_gpt3_is_the_table(size, shape):
    config = load_config(CONFIGS / "gpt" / f"gpt3-{size}.yaml")
    layers, hidden, tokens = shape
    assert (config.model.layers, config.model.hidden) == (layers, hidden)
    assert config.parallel.global_batch * config.model.sequence_length == pytest.approx(tokens, rel=0.05)
    name = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert parameters(f"gpt/gpt3-{size}") == pytest.approx(name, rel=0.02)
    assert config.run.steps * config.parallel.global_batch * 2048 == pytest.approx(300e9, rel=1e-3)


@pytest.mark.parametrize(("name", "whole", "active"), [  # billions: Jiang et al. 2024, table 2; DeepSpeed-MoE, table 1
    ("mixtral-8x7b", 46.7, 12.9), ("gpt3-1.3b-moe-128", 52.5, 1.32), ("switch-base-8", 0.619, 0.223)])
def test_experts_that_a_token_does_not_meet_are_idle(name, whole, active):
    config = load_config(CONFIGS / "moe" / f"{name}.yaml")
    count, idle = (of(config.model) for of in (config.spec.parameter_count, config.spec.idle_parameter_count))
    assert (count / 1e9, (count - idle) / 1e9) == pytest.approx((whole, active), rel=5e-3)


@pytest.mark.parametrize("family", [*FAMILIES, "moe"])
def test_tiny_divides_by_4(family):
    config = load_config(CONFIGS / family / "tiny.yaml")
    traits = config.spec.traits(config.model)
    assert all(size % 4 == 0 for size in (traits.layers, traits.hidden, traits.heads, traits.kv_heads, traits.ffn,
                                          traits.vocab_size, traits.sequence_length, traits.target_length or 0))
