"""Every pair of options is trained by the parity suite, or refused by a rule whose remedy works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import pairs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[dict]:
    """The configs that the tests of `tests/parity` train, read from those tests as they run."""
    record = tmp_path_factory.mktemp("record") / "runs.jsonl"
    done = subprocess.run([sys.executable, "-m", "pytest", "tests/parity", "-q", "-p", "no:cacheprovider", "-p",
                           "tests.helpers.recorder", "--record", str(record)], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert record.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    found = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    assert len(found) > 100
    return found


@pytest.fixture(scope="module")
def trained(runs) -> set[pairs.Pair]:
    return set().union(*(pairs.trained_pairs(run) for run in runs))


def test_every_pair_is_trained_or_refused(trained):
    neither = []
    for pair in pairs.all_pairs():
        verdict = pairs.judge(pair)
        if verdict.kind == "wrong" or (verdict.kind == "legal" and pair not in trained):
            neither.append(f"{verdict.kind} {told(pair)}: {verdict.words or pairs.overrides(verdict.choices)}")
        assert not (verdict.kind == "refused" and pair in trained), f"trained and refused: {told(pair)}"
    assert not neither, f"{len(neither)} pairs are neither trained nor refused:\n" + "\n".join(neither)


def test_every_option_is_trained_where_two_tensors_cross_a_stage_boundary(runs):
    """Together with experts, whose auxiliary loss enters in the backward: a third value beside each pair of those."""
    crossing = [pairs.trained_values(run) for run in runs if run["model"].get("experts")
                and run["parallel"]["pipeline"] > 1 and pairs.crosses_two_tensors(run)]
    assert {values["model.family"] for values in crossing} == set(pairs.ENCODER_DECODERS)
    trained = {item for values in crossing for item in values.items()}
    missing = [f"{key}={value}" for key, value in pairs.boundary_pairs() if (key, value) not in trained]
    assert not missing, f"never trained with experts and a cut inside a decoder: {', '.join(missing)}"


def told(pair: pairs.Pair) -> str:
    return " x ".join(f"{key}={value}" for key, value in pair)


def test_the_walk_meets_known_rules():
    kinds = {told(pair): pairs.judge(pair).kind for pair in pairs.all_pairs()}
    assert kinds["parallel.pipeline=2 x parallel.zero_stage=2"] == "refused"
    assert kinds["parallel.tensor=1 x parallel.sequence=True"] == "refused"
    assert kinds["parallel.sequence=True x parallel.zero_stage=3"] == "legal"
    assert kinds["parallel.pipeline=2 x model.family=clip"] == "refused"
    assert kinds["model.family=clip x model.tied_head=True"] == "void"


def test_a_field_without_values_is_told(monkeypatch):
    monkeypatch.delitem(pairs.VALUES, "parallel.tensor")
    with pytest.raises(LookupError, match="parallel.tensor"):
        pairs.options()
