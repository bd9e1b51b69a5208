"""Two engines on one set of process groups, stepped by one task: each gives what it gives alone, to the bit."""

from __future__ import annotations

import hashlib

import pytest

from tests.helpers.marks import slow_after
from tests.helpers.ranks import run_ranks
from tests.helpers.recipes import GPT, VOCAB_SIZE

PARALLEL = {"micro_batch": 2, "global_batch": 8, "expert": 2, "zero_stage": 1}
EXPERTS = {"experts": 4, "top_k": 2, "bias_rate": 1e-3}
OTHER_EXPERTS = {"experts": 2, "hidden": 32, "expert_every": 2}
DENSE = {"hidden": 32}


def config_of(model: dict, seed: int, parallel: dict):
    from pretrain.config.run_config import config_from

    parallel = PARALLEL | parallel
    if "experts" not in model:
        del parallel["expert"]
    return config_from({**GPT, "run": {**GPT["run"], "seed": seed}, "data": {"train": "unused"},
                        "model": {**GPT["model"], "layers": 2, **model}, "parallel": parallel}, "test")


class InTurn:
    """A task that steps every engine on the same batches and reports each under its name."""

    def __init__(self, rank: int):
        self.rank = rank

    def step(self, engines, step):
        import torch

        tokens = torch.randint(VOCAB_SIZE, (2, 2, 33), generator=torch.Generator().manual_seed(10 * step + self.rank))
        record = {"step": step}
        for name, engine in engines.items():
            result = engine.train_step([{"tokens": part} for part in tokens], step, 1e-3)
            record[name] = (result.loss, result.grad_norm, result.routing)
        return record


def trained(info, models: dict[str, dict], parallel: dict) -> dict[str, tuple]:
    """By engine: (losses and norms of three steps, a hash of this rank's weights and moments)."""
    import torch

    from parallel.layout import Layout
    from parallel.process_groups import build_groups
    from parallel.ranks.rendezvous import join
    from pretrain.training.build_engine import build_engine

    join(info)
    groups = build_groups(Layout(data=2, expert=2))
    engines = {name: build_engine(config_of(model, seed, parallel), groups, torch.device("cpu"))
               for name, (model, seed) in models.items()}
    task = InTurn(info.rank)
    records = [task.step(engines, step) for step in (1, 2, 3)]
    found = {}
    for name, engine in engines.items():
        digest = hashlib.sha256()
        for fragment in engine.owned_fragments():
            digest.update(fragment.tensor.detach().numpy().tobytes())
        found[name] = ([record[name] for record in records], digest.hexdigest())
        engine.close()
    return found


@pytest.mark.parametrize(("other", "parallel"), slow_after(1, [
    (OTHER_EXPERTS, {}), (DENSE, {}), (OTHER_EXPERTS, {"zero_stage": 0}),
]), ids=["experts", "dense", "experts-zero0"])  # fmt: skip
def test_each_is_as_alone(other, parallel):
    models = {"model": (EXPERTS, 11), "other": (other, 12)}
    together = run_ranks(trained, 2, models, parallel)
    for name, model in models.items():
        alone = run_ranks(trained, 2, {name: model}, parallel)
        assert [found[name] for found in together] == [found[name] for found in alone]
        (first, *_), = {tuple(map(str, found[name][0])) for found in alone}
        assert first
