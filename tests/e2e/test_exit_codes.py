"""The same mistake gives the same exit code from every verb, with one message and no traceback.

A mistake breaks a copy of something whole and names its place, {bad}; each verb below it then meets the mistake.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pretrain.cli import main

pytestmark = pytest.mark.slow

DATA, USER, STORAGE = 65, 2, 74
SHARD = ("data shard --input {data}/text/heldout --split all --tokenizer {data}/tokenizer.model --to ")
READS_DATA = (
    "train {recipe} --nproc 1 run.dir={new} data.train={bad}",
    "train {recipe} --nproc 1 run.dir={new} data.heldout={bad}",
    "submit {recipe} --launcher torchrun --print run.dir={new} data.train={bad}",
    "selfcheck {recipe} --nproc 1 run.dir={new} data.train={bad}",
    "data verify {bad}",
    "data stats {bad}",
    "evaluate {run} --data {bad}",
)
READS_MODEL = (
    "evaluate {bad} --data {data}/heldout",
    "generate {bad} --prompt x",
)
READS_CHECKPOINT = (
    *READS_MODEL,
    "checkpoint verify {bad}",
    "checkpoint export {bad} --to {new} --no-certificate",
)
WRITES = (
    "data tokenizer --input {data}/text/train --vocab-size 400 --to {bad}",
    SHARD + "{bad}",
    "data shapes --to {bad} --num-train 4 --num-test 32 --size 16",
    "checkpoint export {run} --to {bad} --no-certificate",
    "checkpoint import {hf} --to {bad}",
    "train {recipe} --nproc 1 run.dir={bad}",
    "submit {recipe} --launcher torchrun run.dir={bad}",
    "demo --dir {bad}",
)
READS_CONFIG = (
    "train {bad} --nproc 1",
    "submit {bad} --launcher torchrun --print",
    "selfcheck {bad} --nproc 1",
    "status {bad}",
    "cancel {bad}",
)


class Things(NamedTuple):
    """What is whole: a folder of datasets, a config over them, a run of one step, and its transformers folder."""

    data: Path
    recipe: Path
    run: Path
    hf: Path


class Mistake(NamedTuple):
    code: int
    breaks: Callable[[Things, Path], Path]  # given a path that is free, the path of the mistake
    verbs: tuple[str, ...]


def copied(source: str, change: Callable[[Path], object]) -> Callable[[Things, Path], Path]:
    """A copy of one of the things, or of a folder in it, after a change."""
    thing, _, inside = source.partition("/")

    def breaks(things: Things, free: Path) -> Path:
        shutil.copytree(getattr(things, thing) / inside, free)
        change(free)
        return free

    return breaks


def shorten(pattern: str) -> Callable[[Path], object]:
    """Cuts the end off a file."""
    return lambda folder: (path := next(folder.rglob(pattern))).write_bytes(path.read_bytes()[:-64])


def replace(pattern: str, text: str) -> Callable[[Path], object]:
    return lambda folder: next(folder.rglob(pattern)).write_text(text, encoding="utf-8")


def remove(pattern: str) -> Callable[[Path], object]:
    return lambda folder: [path.unlink() for path in folder.rglob(pattern)]


def as_file(_: Things, free: Path) -> Path:
    free.write_text("", encoding="utf-8")
    return free


def config(text: str) -> Callable[[Things, Path], Path]:
    def breaks(things: Things, free: Path) -> Path:
        free.write_text(things.recipe.read_text(encoding="utf-8") + text, encoding="utf-8")
        return free

    return breaks


MISTAKES = {
    "damaged shard": Mistake(DATA, copied("data/train", shorten("*.tar")), (*READS_DATA, SHARD + "{bad}")),
    "truncated index": Mistake(DATA, copied("data/train", shorten("*.index")), (*READS_DATA, SHARD + "{bad}")),
    "missing shard": Mistake(DATA, copied("data/train", remove("*.tar")), (*READS_DATA, SHARD + "{bad}")),
    "manifest that is not JSON": Mistake(DATA, copied("data/train", replace("dataset.json", "{")),
                                         (*READS_DATA, SHARD + "{bad}")),
    "manifest of brackets": Mistake(DATA, copied("data/train", replace("dataset.json", "[" * 100_000)),
                                    (*READS_DATA, SHARD + "{bad}")),
    "dataset without its tokenizer": Mistake(DATA, copied("data/train", remove("*.model")),
                                             (READS_DATA[0], READS_DATA[1], READS_DATA[2], READS_DATA[4])),
    "no dataset": Mistake(USER, lambda things, free: free, READS_DATA),
    "damaged checkpoint": Mistake(DATA, copied("run", shorten("*.safetensors")), (
        *READS_CHECKPOINT, "train {recipe} --nproc 1 run.dir={bad} run.steps=2",
        "train {recipe} --nproc 1 run.dir={new} checkpoint.start_from={bad}")),
    "checkpoint with a damaged manifest": Mistake(DATA, copied("run", shorten("manifest.json")), (
        *READS_CHECKPOINT, "checkpoint list {bad}", "train {recipe} --nproc 1 run.dir={bad} run.steps=2",
        "train {recipe} --nproc 1 run.dir={new} checkpoint.start_from={bad}")),
    "checkpoint without its tokenizer": Mistake(DATA, copied("run", remove("tokenizer.model")), READS_CHECKPOINT),
    "no checkpoint": Mistake(USER, lambda things, free: free, (
        *READS_CHECKPOINT, "checkpoint list {bad}",
        "train {recipe} --nproc 1 run.dir={new} checkpoint.start_from={bad}")),
    "target that is a file": Mistake(USER, as_file, WRITES),
    "target inside a file": Mistake(USER, lambda things, free: as_file(things, free) / "inside",
                                    (*WRITES, "data corpus --input {data}/text/heldout --to {bad}")),
    "target that may not be written": Mistake(USER, lambda things, free: Path("/sys/trainyard"),
                                              (*WRITES, "data corpus --input {data}/text/heldout --to {bad}")),
    "unknown key": Mistake(USER, config("\nextra: {key: 1}\n"), READS_CONFIG),
    "no config": Mistake(USER, lambda things, free: free, READS_CONFIG),
    "config that is not YAML": Mistake(USER, config("\n]["), READS_CONFIG),
    "damaged transformers folder": Mistake(DATA, copied("hf", shorten("model.safetensors")),
                                           (*READS_MODEL, "checkpoint import {bad} --to {new}")),
    "config.json that is not JSON": Mistake(DATA, copied("hf", replace("config.json", "{")),
                                            (*READS_MODEL, "checkpoint import {bad} --to {new}")),
    "no transformers folder": Mistake(USER, lambda things, free: free,
                                      (*READS_MODEL, "checkpoint import {bad} --to {new}")),
    "no tokenizer": Mistake(USER, lambda things, free: free, (
        "data shard --input {data}/text/heldout --tokenizer {bad} --to {new}",
        "data images --input {data} --tokenizer {bad} --to {new}")),
    "no input": Mistake(USER, lambda things, free: free, (
        "data corpus --input {bad}", "data tokenizer --input {bad} --to {new}",
        "data shard --input {bad} --tokenizer {data}/tokenizer.model --to {new}",
        "data images --input {bad} --tokenizer {data}/tokenizer.model --to {new}")),
}
FULL_STORAGE = (
    "data corpus --input {data}/text/train --to {new}",
    "data tokenizer --input {data}/text/train --vocab-size 400 --to {new}",
    "data shard --input {data}/text/train --tokenizer {data}/tokenizer.model --to {new}",
    "checkpoint export {run} --to {new} --no-certificate",
    "checkpoint import {hf} --to {new}",
)


def make_things(folder: Path, data: Path, recipe: Path) -> Things:
    """Trains one step and exports it."""
    run, hf = folder / "run", folder / "hf"
    for argv in (["train", str(recipe), "--nproc", "1", f"run.dir={run}", "run.steps=1", "schedule.warmup_steps=0"],
                 ["checkpoint", "export", str(run), "--to", str(hf), "--no-certificate"]):
        subprocess.run([sys.executable, "-m", "pretrain", *argv], check=True, capture_output=True, timeout=300)
    return Things(data, recipe, run, hf)


def words_of(verb: str, things: Things, bad: Path, new: Path) -> list[str]:
    return [word.format(**things._asdict(), bad=bad, new=new) for word in verb.split()]


def in_a_process(argv: list[str], limit_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """The real command; every file above `limit_bytes` is refused by the kernel, as by a full disk."""
    def limit() -> None:
        if limit_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.run([sys.executable, "-m", "pretrain", *argv], capture_output=True, text=True, check=False,
                          timeout=300, preexec_fn=limit)


@pytest.fixture(scope="module")
def things(tmp_path_factory, dataset, recipe) -> Things:
    return make_things(tmp_path_factory.mktemp("whole"), dataset, recipe)


@pytest.mark.parametrize("name", MISTAKES)
def test_same_code_from_every_verb(name, things, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mistake = MISTAKES[name]
    codes = {}
    for number, verb in enumerate(mistake.verbs):
        bad = mistake.breaks(things, tmp_path / f"bad-{number}")
        argv = words_of(verb, things, bad, tmp_path / f"new-{number}")
        if "run.steps" in verb or "start_from" in verb:  # these start a rank, which changes its process for good
            done = in_a_process(argv)
            codes[verb], said = done.returncode, done.stderr
        else:
            codes[verb] = main(argv)
            said = capfd.readouterr().err
            said += "" if verb.startswith(("data verify", "checkpoint verify", "checkpoint list")) else said or "silent"
        assert "Traceback" not in said, said
        assert "defect" not in said, said
    assert codes == dict.fromkeys(mistake.verbs, mistake.code)


@pytest.mark.parametrize("verb", FULL_STORAGE)
def test_storage_that_fails(verb, things, tmp_path):
    done = in_a_process(words_of(verb, things, tmp_path, tmp_path / "new"), limit_bytes=4000)
    assert done.returncode == STORAGE, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot write" in done.stderr
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
