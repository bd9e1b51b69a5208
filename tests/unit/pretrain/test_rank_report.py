"""Who differs from the other ranks, and in what."""

from __future__ import annotations

import pytest

from pretrain.selfcheck.rank_report import SharedToken, breaks_groups, code_hash, differing, free_host_bytes, skewed


def rank(number: int, node: str = "n1", problems=(), free=None, **same) -> dict:
    return {"rank": number, "node": node, "problems": list(problems), "free_device_bytes": free,
            "same": {"torch": "2.9", "config": "aa", "code of parallel": "bb", "code of pretrain": "cc", **same}}


def told(facts) -> list[tuple[int, str, str]]:
    return [(finding.rank, finding.node, finding.text) for finding in differing(facts)]


def test_equal_ranks_are_well():
    assert told([rank(0, free=80), rank(1, free=79), rank(2, free=81)]) == []


def test_the_minority_is_named():
    facts = [rank(0, torch="2.8"), rank(1), rank(2, "n2"), rank(3, "n2")]
    assert told(facts) == [(0, "n1", "torch is 2.8, while 3 ranks have 2.9")]


def test_of_two_ranks_the_other_one_is_named():
    assert told([rank(0), rank(1, "n2", config="dd")]) == [(1, "n2", "config is dd, while rank 0 has aa")]
    assert breaks_groups([rank(0), rank(1, config="dd")])
    assert not breaks_groups([rank(0), rank(1, torch="2.8")])


def test_what_a_node_says_of_itself_is_told():
    assert told([rank(0), rank(1, problems=["the package deepspeed is missing"])]) == [
        (1, "n1", "the package deepspeed is missing")]


def test_a_device_that_another_process_uses():
    ((number, _, text),) = told([rank(n, free=(10 if n == 2 else 100) * 2**30) for n in range(4)])
    assert number == 2
    assert text.startswith("10.0 GiB are free on its device, 100.0 GiB on most")


@pytest.mark.parametrize(("offset", "words"), [(0.2, None), (7.25, "+7.2 s"), (-60.0, "-60.0 s")])
def test_a_clock_that_is_off(offset, words):
    found = skewed([rank(0), rank(1, "n2")], [0.0, offset])
    assert [finding.node for finding in found] == (["n2"] if words else [])
    assert all(words in finding.text for finding in found)


def test_a_shared_folder_leaves_nothing(tmp_path):
    with SharedToken(tmp_path / "runs" / "new", "t", True) as mine:
        assert mine.problem() is None
        assert SharedToken(tmp_path / "runs" / "new", "t", False).problem() is None
    assert list(tmp_path.iterdir()) == []


def test_facts_of_this_machine():
    assert len({code_hash(room) for room in ("parallel", "pretrain")}) == 2
    assert free_host_bytes() is None or free_host_bytes() > 2**20
