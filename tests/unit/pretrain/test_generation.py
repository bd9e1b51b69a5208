"""Sampling on known logits, and the cache against running the whole sequence anew."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.ranks import run_ranks

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0])


def drawn(sampling, count=400):
    from pretrain.generation import choose

    generator = torch.Generator().manual_seed(5)
    return {choose(LOGITS, sampling, generator) for _ in range(count)}


def test_sampling_limits():
    from pretrain.generation import Sampling

    assert drawn(Sampling(temperature=0.0)) == {1}
    assert drawn(Sampling(top_k=2)) == {1, 3}
    assert drawn(Sampling(top_p=0.5)) == {1}, "the most likely token stays even when it alone passes p"
    assert drawn(Sampling(top_p=0.8)) == {1, 3}
    assert drawn(Sampling()) == {0, 1, 2, 3}
    assert drawn(Sampling(temperature=0.05)) == {1}


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cache_changes_nothing(positions, kv_heads):
    cached, plain = run_ranks(_generate_both_ways, 1, positions, kv_heads)[0]
    assert cached == plain
    assert len(set(cached)) > 3


def _generate_both_ways(info, positions, kv_heads):
    from parallel.initialise import draw
    from parallel.megatron import TensorShard
    from parallel.pipeline import Stage
    from pretrain.generation import Sampling, continue_tokens
    from pretrain.models.gpt.modules import layers
    from pretrain.models.gpt.spec import GPTConfig
    from pretrain.trained import single_rank

    config = GPTConfig(layers=2, hidden=32, heads=4, kv_heads=kv_heads, vocab_size=64, sequence_length=48,
                       positions=positions, init_std=0.3)
    with single_rank() as groups:
        specs = layers(config, TensorShard(groups, torch.device("cpu")))
        stage = Stage(specs, 0, len(specs)).eval()
        for name, parameter in stage.named_global_parameters():
            parameter.data.copy_(draw(name, tuple(parameter.shape), parameter.plan, 3))
        prompt = [5, 9, 2]
        cached = list(continue_tokens(stage, prompt, 40, 48, Sampling(temperature=0.0), stop_token=None))
        tokens = list(prompt)
        with torch.no_grad():
            for _ in cached:
                tokens.append(int(stage.run(torch.tensor([tokens]))[-1, 0].argmax()))
        return cached, tokens[len(prompt):]
