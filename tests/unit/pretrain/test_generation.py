"""Sampling on known logits, and the cache against running the whole sequence anew."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.ranks import run_ranks

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0])


def drawn(sampling, count=400):
    from pretrain.inference.generation import choose

    generator = torch.Generator().manual_seed(5)
    return {choose(LOGITS, sampling, generator) for _ in range(count)}


def test_sampling_limits():
    from pretrain.inference.generation import Sampling

    assert drawn(Sampling(temperature=0.0)) == {1}
    assert drawn(Sampling(top_k=2)) == {1, 3}
    assert drawn(Sampling(top_p=0.5)) == {1}, "the most likely token stays even when it alone passes p"
    assert drawn(Sampling(top_p=0.8)) == {1, 3}
    assert drawn(Sampling()) == {0, 1, 2, 3}
    assert drawn(Sampling(temperature=0.05)) == {1}


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cache_changes_nothing(positions, kv_heads):
    largest, generated = run_ranks(_with_and_without_cache, 1, positions, kv_heads)[0]
    assert largest < 1e-11
    assert len(generated) == 40, "up to the end of the context and no further"


def _with_and_without_cache(info, positions, kv_heads):
    """(largest difference of a logit over a sequence fed in pieces, in fp64, tokens generated from 8 of 48)."""
    from parallel.parameter_plan import draw
    from parallel.pipeline_stages import Stage
    from parallel.single_rank import single_rank
    from parallel.tensor_parallel import TensorParallel
    from pretrain.inference.generation import Sampling, continue_tokens
    from pretrain.models.blocks import Cache
    from pretrain.models.gpt.modules import layers
    from pretrain.models.gpt.spec import GPTConfig

    config = GPTConfig(layers=2, hidden=32, heads=4, kv_heads=kv_heads, vocab_size=64, sequence_length=48,
                       positions=positions, init_std=0.3)
    with single_rank() as groups, torch.no_grad():
        specs = layers(config, TensorParallel(groups, torch.device("cpu")))
        stage = Stage(specs, (0, len(specs))).eval()
        for name, parameter in stage.named_global_parameters():
            parameter.copy_(draw(name, tuple(parameter.shape), parameter.plan, 3))
        stage.double()  # so that rounding, which weights of this size amplify, is far below any mistake
        tokens = torch.randint(64, (1, 48), generator=torch.Generator().manual_seed(1))
        cache, pieces = Cache(max_tokens=48), []
        for begin, end in [(0, 7), *((at, at + 1) for at in range(7, 48))]:
            pieces.append(stage.run(tokens[:, begin:end], cache=cache))
            cache.length = end
        difference = (torch.cat(pieces) - stage.run(tokens)).abs().max()
        generated = list(continue_tokens(stage, tokens[0, :8].tolist(), 100, 48, sampling=Sampling(), stop_token=None))
        return float(difference), generated
