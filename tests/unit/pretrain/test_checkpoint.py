"""Checkpoints: where they are, and that any layout reads the ranges that it keeps and no other bytes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import CheckpointError, ExitCode, OtherFormatError, UserError
from parallel.layout import Layout
from parallel.parameter_plan import InitialWeights, ParameterPlan, draw_range
from parallel.single_rank import single_rank
from parallel.tensor_slice import OwnedFragment, SliceRange
from parallel.zero.optimizer_state import KINDS
from pretrain.checkpoint import store
from pretrain.checkpoint.locate import checkpoints_at, require_checkpoints
from pretrain.checkpoint.manifest import (
    FORMAT,
    file_entry,
    package_versions,
    read_manifest,
    sha256_of,
    write_manifest,
)
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.store import newest_whole
from pretrain.checkpoint.tensor_file import Planned, TensorFile, write_tensors
from tests.helpers.marks import slow_after
from tests.helpers.ranks import run_ranks
from tests.helpers.recipes import GPT

# name: (global shape, slice dim), of one block; a model has some of them
BLOCK = {"norm": ((64,), None), "up.weight": ((256, 64), 0), "up.bias": ((256,), 0), "down.weight": ((64, 256), 1)}


class Known:
    """A source whose every element, moments too, is a function of its global place."""

    adam_step = 17

    def read(self, wanted: SliceRange) -> torch.Tensor:
        plan = ParameterPlan(0.0, 1.0, None)
        return draw_range(replace(wanted, name=f"{wanted.name}/{wanted.kind}"), plan, seed=1)


class BytesRead:
    """Counts the bytes of data that are read from files by range."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.count, self.read = 0, os.preadv
        patch.setattr(os, "preadv", self)

    def __call__(self, *args) -> int:
        found = self.read(*args)
        self.count += found
        return found


# -- a simulated world: ranges by arithmetic, as ZeRO 1 cuts them ------------------------------------------------------


def kept(layout: Layout, rank: int, num_blocks: int) -> list[SliceRange]:
    """The ranges of a rank: its stage's slices, one behind the other, cut into equal parts over the data ranks."""
    at = layout.coordinates(rank)
    of_stage = range(at.pp * num_blocks // layout.pipeline, (at.pp + 1) * num_blocks // layout.pipeline)
    found = []
    for kind in KINDS:
        held = [SliceRange.slice(f"blocks.{block}.{name}", shape, dim, rank=at.tp, size=layout.tensor, kind=kind)
                for block in of_stage for name, (shape, dim) in BLOCK.items()]
        share = -(-sum(part.count for part in held) // layout.data)
        begin = 0
        for part in held:
            start, end = max(0, at.dp * share - begin), min(part.count, (at.dp + 1) * share - begin)
            if start < end:
                found.append(part.part(start, end - start))
            begin += part.count
    return found


def write(folder: Path, layout: Layout, num_blocks: int, source: Known) -> Path:
    """The checkpoint that the ranks of a layout write; each element is written by one of them."""
    folder.mkdir(parents=True)
    files = []
    for rank in range(layout.world_size):
        first = layout.coordinates(rank).tp == 0
        owned = [OwnedFragment(part, source.read(part)) for part in kept(layout, rank, num_blocks)
                 if part.slice_dim is not None or first]
        files.append(store._write_own(folder, rank, owned))
    write_manifest(folder, {"format": FORMAT, "files": files, "versions": package_versions(), "step": 5,
                            "adam_step": 17})
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Written by tensor 4 x pipeline 2 x data 2."""
    return write(tmp_path_factory.mktemp("run") / "checkpoints" / "step-00000005", Layout(4, 2, 2), 16, Known())


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(8, 16, 8), Layout(4, 2, 2), Layout(), Layout(2, 4, 3)],
                         ids=lambda layout: layout.words)
def test_a_rank_reads_the_bytes_that_it_keeps(layout, written, monkeypatch):
    checkpoint, source = Checkpoint(written), Known()
    assert checkpoint.incomplete() == []
    counted = BytesRead(monkeypatch)
    for rank in range(layout.world_size):
        counted.count = num_kept = 0
        for part in kept(layout, rank, 16):
            assert torch.equal(checkpoint.read(part), source.read(part))
            num_kept += 4 * part.count
        assert num_kept <= counted.count <= 1.1 * num_kept


def test_a_slicing_along_another_dim_is_read(written):
    checkpoint, source = Checkpoint(written), Known()
    for name, dim in (("up.weight", 1), ("down.weight", 0)):
        part = SliceRange.slice(f"blocks.3.{name}", BLOCK[name][0], dim, rank=1, size=2).part(100, 5001)
        assert torch.equal(checkpoint.read(part), source.read(part))
    shape = BLOCK["down.weight"][0]
    assert torch.equal(checkpoint.tensor("blocks.7.down.weight", "exp_avg"),
                       source.read(SliceRange.whole("blocks.7.down.weight", shape, "exp_avg")).view(shape))


def test_few_files_are_open_at_once(written, monkeypatch):
    monkeypatch.setattr("pretrain.checkpoint.reader.MAX_OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = Checkpoint(written)
    for block in range(16):
        checkpoint.tensor(f"blocks.{block}.up.weight")
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) == before


# -- real ranks --------------------------------------------------------------------------------------------------------


def config_of(**parallel) -> dict:
    return {**GPT, "data": {"train": "unused"}, "parallel": {"micro_batch": 2, "global_batch": 8, **parallel}}


def engine_on(info, values: dict, source_at: Path | None = None):
    """An engine on these ranks, from the newest checkpoint of a folder or with initial weights."""
    from parallel.process_groups import build_groups
    from parallel.ranks.rendezvous import join
    from pretrain.config.run_config import config_from
    from pretrain.training.build_engine import build_engine

    config = config_from(values, "test")
    join(info)
    groups = build_groups(Layout.of(config.parallel, info.world_size))
    source = newest_whole(source_at)[0] if source_at else None
    with pytest.MonkeyPatch.context() as patch:
        counted = BytesRead(patch)
        return build_engine(config, groups, torch.device("cpu"), source), counted.count


def every_range(engine):
    for kind in KINDS:
        for name, start, tensor in engine.state.fragments(kind):
            yield engine._slice(name, kind).part(start, tensor.numel()), tensor


def drawn_then_saved(info, values: dict, folder: Path) -> int:
    """How many weights were drawn here; every one was as the definition says. Then saves other numbers."""
    engine, _ = engine_on(info, values)
    plans = {name: slot.parameter.plan for name, slot in engine.slots.items()}
    initial, drawn = InitialWeights(plans, engine.seed), 0
    for part, tensor in every_range(engine):
        expected = initial.read(part)
        assert torch.equal(tensor, torch.zeros_like(tensor) if expected is None else expected)
        drawn += part.count if expected is not None else 0
    engine.fill(Known())
    for part, tensor in engine.owned_fragments():
        assert torch.equal(tensor, Known().read(part))
    store.save(folder, 5, engine.owned_fragments(), {"adam_step": 17}, keep=1)
    return drawn


def read_back(info, values: dict, folder: Path) -> tuple[int, int]:
    """(bytes read, bytes kept) of an engine that starts from the checkpoint; every element is as it was saved."""
    engine, num_read = engine_on(info, values, folder)
    num_kept = 0
    for part, tensor in every_range(engine):
        assert torch.equal(tensor, Known().read(part))
        num_kept += 4 * part.count
    assert {int(state["step"]) for state in engine.state.base.state.values()} == {17}
    return num_read, num_kept


def num_elements(checkpoints: Path) -> int:
    """Of the model in a folder of checkpoints."""
    shapes = Checkpoint(checkpoints / "step-00000005").shapes
    return sum(SliceRange.whole(name, shape).count for name, shape in shapes.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Saved by tensor 2 x data 2 at ZeRO 1, which kept every weight on one data rank."""
    folder = tmp_path_factory.mktemp("saved")
    drawn = run_ranks(drawn_then_saved, 4, config_of(tensor=2, zero_stage=1), folder)
    whole = num_elements(folder)
    assert whole <= sum(drawn) < 1.1 * whole, "what tensor ranks hold in full is drawn by both"
    return folder


@pytest.mark.parametrize(("ranks", "parallel", "holders"), slow_after(1, [
    (2, {"zero_stage": 3}, 1), (4, {"tensor": 2, "zero_stage": 0}, 2), (4, {"tensor": 2, "zero_stage": 1}, 1),
    (4, {"pipeline": 2, "zero_stage": 1}, 1)]), ids=str)  # fmt: skip
def test_each_byte_is_read_once_by_each_holder(ranks, parallel, holders, saved):
    found = run_ranks(read_back, ranks, config_of(**parallel), saved)
    assert [num_read for num_read, _ in found] == [num_kept for _, num_kept in found]
    size = 4 * len(KINDS) * num_elements(saved)
    tied = 4 * len(KINDS) * 512 * 64 if "pipeline" in parallel else 0  # the last stage has a copy of the table
    assert size <= (sum(num_read for num_read, _ in found) - tied) / holders < 1.1 * size


# -- what is refused ---------------------------------------------------------------------------------------------------


def small(folder: Path, **manifest) -> Path:
    """A whole checkpoint with one tensor."""
    folder.mkdir(parents=True)
    part = SliceRange.whole("a", (6,))
    entry = store._write_own(folder, 0, [OwnedFragment(part, torch.arange(6.0))])
    write_manifest(folder, {"format": FORMAT, "files": [entry], "versions": {"trainyard": "0.0.9"}, "step": 5,
                            "adam_step": 0, **manifest})
    return folder


def test_another_format_is_refused_by_the_version_that_wrote_it(tmp_path):
    """Also where an older checkpoint could be read: to go on from that would lose what the other version trained."""
    small(tmp_path / "checkpoints" / "step-00000004")
    newest = small(tmp_path / "checkpoints" / "step-00000005", format=FORMAT + 1)
    with pytest.raises(OtherFormatError, match=r"Trainyard 0\.0\.9 wrote this checkpoint in format 2, and Trainyard "
                       r"\S+ reads format 1") as refused:
        read_manifest(newest)
    assert refused.value.exit_code == ExitCode.USER
    with single_rank():
        with pytest.raises(OtherFormatError, match=r"0\.0\.9"):
            newest_whole(tmp_path)
        (newest / "manifest.json").write_text("{")
        checkpoint, rejected = newest_whole(tmp_path)
    assert checkpoint.folder.name == "step-00000004"
    assert "cannot be read" in rejected[0]


def cut_short(path: Path, num_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - num_bytes)


def with_another_index(folder: Path, **fields) -> None:
    """Write the file of a checkpoint again, with other fields in its list of fragments."""
    path = folder / "rank-00000.safetensors"
    index = json.loads(TensorFile(path).metadata["fragments"])
    index["000000"] |= fields
    write_tensors(path, [Planned("000000", (6,), torch.float32)], [torch.arange(6.0)], {"fragments": json.dumps(index)})


@pytest.mark.parametrize(("damage", "message"), [
    (lambda folder: (folder / "rank-00000.safetensors").write_bytes(b"1234"), "a header of"),
    (lambda folder: (folder / "rank-00000.safetensors").write_bytes(b"\xff" * 100), "a header of"),
    (lambda folder: cut_short(folder / "rank-00000.safetensors", 4), "bytes 0 to 24 of data, of which there are 20"),
    (lambda folder: with_another_index(folder, count=5), "is not as the list of fragments says"),
    (lambda folder: with_another_index(folder, rows=5), "cannot be read"),
    (lambda folder: (folder / "rank-00000.safetensors").unlink(), "No such file"),
], ids=["short", "no header", "cut", "count", "field", "missing"])  # fmt: skip
def test_a_damaged_file_is_named(damage, message, tmp_path):
    folder = small(tmp_path / "step-00000005")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as refused:
        Checkpoint(folder)
    assert "rank-00000.safetensors" in str(refused.value)


def test_a_gap_is_found(tmp_path):
    folder = small(tmp_path / "step-00000005")
    with_another_index(folder, shape=[8])
    checkpoint = Checkpoint(folder)
    assert checkpoint.incomplete() == [f"{folder}: the fragments of a (weight) hold 6 elements of 8"]
    with pytest.raises(CheckpointError, match=r"the fragments of a \(weight\) hold 6 elements of 8"):
        checkpoint.tensor("a")
    with pytest.raises(CheckpointError, match="holds no exp_avg of a"):
        checkpoint.tensor("a", "exp_avg")
    cut_short(folder / "rank-00000.safetensors", 4)
    with pytest.raises(CheckpointError, match="ends before byte"):
        checkpoint.read(SliceRange.whole("a", (8,)).part(0, 6))


def test_the_hash_is_taken_while_writing(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.randn(300, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor(2.5), "d": torch.empty(0, 3)}
    planned = [Planned(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    digest = write_tensors(path, planned, tensors.values(), {"format": "pt"})
    assert digest == sha256_of(path)
    assert file_entry(path, digest) == {"name": "a.safetensors", "bytes": path.stat().st_size, "sha256": digest}
    assert all(torch.equal(found, tensors[name]) for name, found in load_file(path).items())


# -- where they are ----------------------------------------------------------------------------------------------------


def test_a_path_names_a_run_its_checkpoints_or_one_step(tmp_path):
    run = tmp_path / "step-3"  # a run folder that is called like a step
    checkpoints = run / "checkpoints"
    for name in ("step-00000002", "step-00000010", "step-00000011.part", "step-", "other"):
        (checkpoints / name).mkdir(parents=True)
    newest_first = [checkpoints / "step-00000010", checkpoints / "step-00000002"]
    assert checkpoints_at(run) == checkpoints_at(checkpoints) == newest_first
    assert checkpoints_at(checkpoints / "step-00000002") == [checkpoints / "step-00000002"]
    assert require_checkpoints(run) == newest_first
    for empty, what in ((checkpoints / "other", "no checkpoint here"), (tmp_path / "nothing", "no such folder"),
                        (checkpoints / "step-00000099", "no such folder")):
        assert checkpoints_at(empty) == []
        with pytest.raises(UserError, match=what):
            require_checkpoints(empty)
