"""Weights that ranks hold in common: one changed element is found, and the rank that differs is named."""

from __future__ import annotations

import json
import random

import pytest
import torch

from launchers.run_folder.status import read
from parallel.checks.replica_check import CHUNK, Difference, _disagreements, fingerprint
from pretrain.training.hooks.health import suspicion
from pretrain.training.hooks.hook import Hook, Hooks
from tests.helpers.ranks import run_ranks
from tests.helpers.recipes import GPT, write_recipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 1000, CHUNK + 7])
def test_any_flipped_bit_changes_the_fingerprint(dtype, size):
    tensor = torch.randn(size).to(dtype)
    bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    before = fingerprint(tensor)
    assert torch.equal(before, fingerprint(tensor.clone()))
    for place in {0, size // 2, size - 1}:
        bit = 1 << random.Random(place).randrange(8 * tensor.element_size() - 1)
        bits[place] ^= bit
        assert (fingerprint(tensor) != before).all()
        bits[place] ^= bit
    assert torch.equal(before, fingerprint(tensor))


def test_exchanged_elements_change_the_fingerprint():
    tensor = torch.arange(10.0)
    assert not torch.equal(fingerprint(tensor), fingerprint(tensor.flip(0)))


def test_the_minority_is_found_where_there_is_one():
    by_rank = [[(1, 5, 5), (2, 7, 7)], [(1, 5, 5), (2, 7, 8)], [(1, 5, 6), (3, 1, 1)], [(4, 0, 0)]]
    assert _disagreements(by_rank) == [(1, (0, 1, 2), (2,)), (2, (0, 1), ())]


@pytest.mark.parametrize(("found", "rank", "node", "words"), [
    ([Difference("a", (0, 1, 2, 3), (3,)), Difference("b", (0, 1, 2, 3), (3,))], 3, "n2",
     "a: rank 3 on n2 against ranks 0 on n1, 1 on n1, 2 on n2"),
    ([Difference("a", (0, 1), ())], None, "n1", "ranks 0, 1 on n1 disagree"),
    ([Difference("a", (0, 2), ())], None, None, "ranks 0 on n1, 2 on n2"),
    ([Difference("a", (0, 1), ()), Difference("b", (0, 1, 2), (1,))], 1, "n1", "Suspected: rank 1 on n1"),
    ([Difference("a", (0, 1, 2, 3), (3,))] * 12, 3, "n2", "and 4 more"),
])  # fmt: skip
def test_what_is_told(found, rank, node, words):
    error = suspicion(found, ["n1", "n1", "n2", "n2"], 2000, 1000)
    assert (error.rank, error.node, error.exit_code) == (rank, node, 71)
    assert words in str(error)
    assert "step 2000" in str(error)


def find_flips(info, values: dict, num_flips: int) -> list:
    """Flips bits of common weights, one at a time, on random ranks: (what should be found, what was) for each."""
    from parallel.checks.replica_check import _held, differences
    from parallel.layout import Layout
    from parallel.process_groups import build_groups
    from parallel.ranks.rendezvous import join
    from pretrain.config.run_config import config_from
    from pretrain.training.build_engine import build_engine

    config = config_from(values, "test")
    join(info)
    groups = build_groups(Layout.of(config.parallel, info.world_size))
    engine = build_engine(config, groups, torch.device("cpu"))
    tokens = torch.randint(512, (values["parallel"]["global_batch"], 33), generator=torch.Generator().manual_seed(5))
    share = len(tokens) // groups.layout.data
    mine = tokens[groups.coordinates.dp * share : (groups.coordinates.dp + 1) * share]
    batches = [{"tokens": part} for part in mine.split(config.parallel.micro_batch)]
    for step in range(1, 6):
        engine.train_step(batches, step, 1e-3)
    results = [(None, differences(engine))]
    common = replicated(engine)
    chance = random.Random(7)
    for _ in range(num_flips):
        identity, holders = chance.choice(common)
        rank, bit, place = chance.choice(holders), chance.randrange(15), chance.random()
        held = dict(_held(engine)).get(identity)
        if info.rank == rank:
            flat = held.view(-1).view({2: torch.int16, 4: torch.int32}[held.element_size()])
            flat[int(place * len(flat))] ^= 1 << bit
        results.append(((json.loads(identity)[0], holders, rank), differences(engine)))
        if info.rank == rank:
            flat[int(place * len(flat))] ^= 1 << bit
    results.append((None, differences(engine)))
    engine.close()
    return results


def replicated(engine) -> list[tuple[str, tuple[int, ...]]]:
    """(identity, holders) of every weight that several ranks hold."""
    from parallel.checks.replica_check import _held
    from parallel.ranks.agreement import all_gather_text

    holders: dict[str, list[int]] = {}
    for rank, text in enumerate(all_gather_text(json.dumps([identity for identity, _ in _held(engine)]))):
        for identity in json.loads(text):
            holders.setdefault(identity, []).append(rank)
    return sorted((identity, tuple(ranks)) for identity, ranks in holders.items() if len(ranks) > 1)


@pytest.mark.parametrize(("world_size", "compute", "parallel"), [
    pytest.param(2, "fp32", {"tensor": 2, "sequence": True}, id="tp2", marks=pytest.mark.slow),
    pytest.param(2, "bf16", {"zero_stage": 1}, id="dp2", marks=pytest.mark.slow),
    pytest.param(4, "bf16", {"zero_stage": 2}, id="dp4", marks=pytest.mark.slow),
    pytest.param(6, "fp32", {"pipeline": 2, "zero_stage": 1}, id="pp2-dp3-tied", marks=pytest.mark.slow),
    pytest.param(4, "bf16", {"tensor": 2, "zero_stage": 3}, id="tp2-dp2-zero3", marks=pytest.mark.slow),
])  # fmt: skip
def test_every_flip_is_found_and_named(world_size, compute, parallel):
    values = {**GPT, "data": {"train": "unused"}, "precision": {"compute": compute},
              "parallel": {"micro_batch": 4, "global_batch": 48, **parallel}}
    by_rank = run_ranks(find_flips, world_size, values, 20)
    assert all(results == by_rank[0] for results in by_rank), "ranks came to different findings"
    flips = [result for result in by_rank[0] if result[0] is not None]
    assert [found for flip, found in by_rank[0] if flip is None] == [[], []], "a sound run was suspected"
    assert len(flips) == 20
    for (name, holders, rank), found in flips:
        assert found == [Difference(name, holders, (rank,) if len(holders) > 2 else ())]


class Flip(Hook):
    """A fault: at one step one element changes on one rank."""

    def __init__(self, rank: int, step: int, name: str) -> None:
        self.rank, self.step, self.name = rank, step, name

    def on_step_end(self, run, record) -> None:
        if record["step"] == self.step and run.rank == self.rank:
            with torch.no_grad():
                run.engine.slots[self.name].parameter.view(-1)[3] += 1e-3


def train_with_a_fault(info, config_path: str, overrides: list[str], flip: Flip | None) -> int:
    from pretrain.commands.train import run_rank
    from pretrain.config.run_config import load_run
    from pretrain.reporting import report
    from pretrain.training import loop

    standard = loop.standard_hooks
    if flip:
        loop.standard_hooks = lambda config, quiet: Hooks([flip, standard(config, quiet)])
    return report(lambda: run_rank(load_run(config_path, overrides, info.world_size), info))


@pytest.mark.slow
def test_a_run_stops_on_every_rank_at_the_check(dataset, tmp_path):
    recipe = write_recipe(tmp_path / "gpt.yaml", dataset)
    folder = tmp_path / "run"
    overrides = [f"run.dir={folder}", "run.steps=12", "run.check_every=4"]
    flip = Flip(rank=2, step=6, name="blocks.1.attention.qkv.weight")
    assert run_ranks(train_with_a_fault, 4, str(recipe), overrides, flip) == [71] * 4
    status = read(folder)
    assert (status.exit_code, status.rank, status.node, status.last_step) == (71, 2, "localhost", 7)
    assert "blocks.1.attention.qkv.weight: rank 2" in status.reason
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 8
    assert run_ranks(train_with_a_fault, 4, str(recipe), [*overrides, f"run.dir={folder}-clean"], None) == [0] * 4
