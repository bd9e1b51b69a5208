"""A config says everything that is wrong with it at once, in words that help, and never with a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common.errors import ConfigError, Problem, render
from pretrain.config.run_config import RunConfig, load_config, load_run

GOOD = """\
run: {dir: DIR/run, steps: 10}
model: {layers: 4, hidden: 64, heads: 4, vocab_size: 512, sequence_length: 32}
objective: {name: causal_lm}
data: {train: DIR/train}
parallel:
  tensor: 1
  micro_batch: 2
  global_batch: 8
optimizer:
  lr: 3e-4
"""


@pytest.fixture
def write(tmp_path):
    def write_config(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text.replace("DIR", str(tmp_path)), encoding="utf-8")
        return path

    return write_config


def problems_of(path, *overrides, world_size=None) -> list[Problem]:
    """Everything wrong, save for the dataset, which these tests do not write."""
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides, world_size)
    return [problem for problem in caught.value.problems if not problem.where.startswith("data.train")]


def only(path, *overrides, world_size=None) -> Problem:
    problems = problems_of(path, *overrides, world_size=world_size)
    assert len(problems) == 1, render(problems, "more or less than one")
    return problems[0]


def test_defaults_and_types(write):
    config = load_config(write(GOOD))
    assert config.optimizer.lr == 3e-4
    assert config.schedule.name == "cosine"
    assert config.model.family == "gpt"
    assert (config.model.num_kv_heads, config.model.ffn_hidden) == (4, 256)


def test_saved_config_reads_back_equal(write, tmp_path):
    odd = ["run.dir='1e5'", "data.heldout='no'", "optimizer.epsilon=1e-12", "optimizer.lr=1", "model.kv_heads=null"]
    config = load_config(write(GOOD), odd)
    config.save(tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert RunConfig.model_validate(config.model_dump()) == config
    plain = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert (plain["run"]["dir"], plain["data"]["heldout"]) == ("1e5", "no")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


def test_nothing_is_rewritten(write):
    config = load_config(write(GOOD), ["run.dir=./a/../b", "parallel.global_batch=24"])
    assert (config.run.dir, config.parallel.global_batch) == ("./a/../b", 24)


def test_config_is_frozen(write):
    config = load_config(write(GOOD))
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 3


def test_overrides_win_and_the_last_one_most(write):
    config = load_config(write(GOOD), ["run.steps=20", "model.norm=rmsnorm", "run.steps=30", "run.seed=5",
                                       "log.tensorboard=false", "checkpoint.every=4"])
    assert (config.run.steps, config.run.seed, config.model.norm) == (30, 5, "rmsnorm")
    assert (config.log.tensorboard, config.checkpoint.every) == (False, 4)


@pytest.mark.parametrize(("key", "value", "possible"), [
    ("run.steps", "ten", "a whole number"), ("run.steps", "0", "greater than or equal to 1"),
    ("run.steps", "10.5", "a whole number"), ("run.steps", "true", "a whole number"),
    ("run.steps", "[1, 2]", "a whole number"), ("run.seed", "-1", "greater than or equal to 0"),
    ("run.dir", "7", "a text"), ("optimizer.lr", "0", "greater than 0"), ("optimizer.lr", ".nan", "finite"),
    ("optimizer.lr", ".inf", "finite"), ("optimizer.beta1", "1.0", "less than 1"),
    ("model.dropout", "1.0", "less than 1"), ("model.dropout", "-0.1", "greater than or equal to 0"),
    ("parallel.sequence", "yes", "true or false"), ("parallel.zero_stage", "4", "less than or equal to 3"),
    ("parallel.tensor", "0", "greater than or equal to 1"), ("parallel.micro_batch", "null", "a whole number"),
    ("schedule.min_lr_ratio", "1.5", "less than or equal to 1"), ("model.layers", "9" * 5000, "plain"),
])
def test_wrong_value(write, key, value, possible):
    problem = only(write(GOOD), f"{key}={value}")
    if possible != "plain":
        assert problem.where == f"{key} (command line)"
        assert possible in problem.possible
        assert possible in problem.change
    assert key in problem.where
    assert len(problem.asked) < 200


@pytest.mark.parametrize(("key", "value", "meant"), [
    ("model.norm", "layernrm", "layernorm"), ("schedule.name", "cosin", "cosine"),
    ("precision.compute", "bf61", "bf16"),
    ("model.family", "gtp", "gpt"), ("objective.name", "causal-lm", "causal_lm"), ("model.family", "7", "gpt"),
    ("checkpoint.resume", "yes", "never"),
])
def test_wrong_choice_lists_the_choices(write, key, value, meant):
    problem = only(write(GOOD), f"{key}={value}")
    assert meant in problem.possible
    if value not in ("7", "yes"):
        assert problem.change == f"set {key} to {meant}"


@pytest.mark.parametrize(("text", "where", "meant"), [
    (GOOD.replace("micro_batch: 2", "micro_batch: 2\n  tensr: 2"), "parallel.tensr (line 8)", "parallel.tensor"),
    (GOOD + "optimiser: {}\n", "optimiser (line 11)", "optimizer"),
])
def test_unknown_key_in_the_file(write, text, where, meant):
    problem = only(write(text))
    assert problem.where == where
    assert problem.change == f"did you mean {meant}?"


@pytest.mark.parametrize(("override", "where", "remedy"), [
    ("paralel.tensor=2", "paralel (command line)", "did you mean parallel?"),
    ("parallel.tensr=2", "parallel.tensr (command line)", "did you mean parallel.tensor?"),
    ("model.zzz=1", "model.zzz (command line)", "delete model.zzz"),
    ("tensor=2", "command line, tensor=2", "name the section"),
    ("parallel.tensor", "command line, parallel.tensor", "without spaces"),
    ("parallel.tensor.x=2", "command line, parallel.tensor.x=2", "name the section"),
    ("=2", "command line, =2", "name the section"),
    ("run.steps=", "command line, run.steps=", "run.steps=null"),
    ("run.steps=[1", "command line, run.steps=[1", "quote the value"),
    ("run.steps={a: 1}", "command line, run.steps={a: 1}", "its own"),
    ("run.steps=*x", "command line, run.steps=*x", "quote the value"),
    ("run.steps=!!python/object:os.system x", "command line, run.steps=!!python/object:os.system x", "quote"),
])
def test_bad_override(write, override, where, remedy):
    problem = only(write(GOOD), override)
    assert problem.where == where
    assert remedy in problem.change


def test_all_problems_at_once(write):
    text = GOOD.replace("steps: 10", "steps: many").replace("tensor: 1", "tensor: 3")
    text = text.replace("lr: 3e-4", "lr: -1\n  lrr: 2")
    problems = problems_of(write(text), "run.sed=3", "objective.name=mlm", world_size=6)
    wheres = [problem.where.partition(" (")[0] for problem in problems]
    assert sorted(wheres) == sorted([
        "run.steps", "run.sed", "optimizer.lr", "optimizer.lrr", "objective.name", "model.heads", "model.kv_heads",
        "model.ffn", "model.vocab_size"])


def test_problems_between_sections_name_their_line(write):
    path = write(GOOD)
    assert only(path, world_size=3).where == "parallel.global_batch (line 8)"
    assert only(path, "parallel.global_batch=7", world_size=1).where == "parallel.global_batch (command line)"
    assert only(path, "log.evaluate_every=5").where == "log.evaluate_every (command line)"


@pytest.mark.parametrize(("overrides", "where", "remedy"), [
    (["model.hidden=66"], "model.heads", "2, 3, 6"),
    (["model.heads=8", "model.kv_heads=3"], "model.kv_heads", "1, 2, 4, 8"),
    (["model.hidden=60", "model.positions=rotary"], "model.positions", "model.hidden to 64"),
])
def test_model_that_does_not_fit_together(write, overrides, where, remedy):
    problem = only(write(GOOD), *overrides)
    assert problem.where.startswith(where)
    assert remedy in problem.change


@pytest.mark.parametrize(("text", "where", "asked"), [
    ("", "run.yaml", "None at the top"),
    ("just words", "run.yaml", "at the top"),
    ("- a\n- b\n", "run.yaml", "at the top"),
    ("run: [1, 2\nmodel: 3\n", "line 2", "expected"),
    ("run: {a: 1}\n\tmodel: 3\n", "line 2", "cannot start any token"),
    ("a: &x [1]\nb: *x\n", "line 2, column 4", "alias"),
    ("run: !!python/object/apply:os.system [echo]\n", "line 1", "could not determine a constructor"),
    ("? [a, b]\n: 1\n", "line 1", "a key is a single word"),
    ("a: " + "[" * 5000, "line 1", "deep"),
    ("a: " + "9" * 5000, "run.yaml", "digits"),
    ("a: 1\n---\nb: 2\n", "line 2", "single document"),
    ("a: \x07\n", "run.yaml", "special characters"),
])
def test_file_that_is_no_config(write, text, where, asked):
    problem = only(write(text))
    assert where in problem.where
    assert asked in problem.asked


def test_duplicate_keys_are_all_told_with_their_lines(write):
    problems = problems_of(write(GOOD + "  lr: 1e-3\nrun: {dir: other, steps: 3}\n"))
    assert [(problem.where.rpartition(", ")[2], problem.asked) for problem in problems] == [
        ("line 12", "`run` again; it is already on line 1"), ("line 11", "`lr` again; it is already on line 10")]


def test_file_that_cannot_be_read(tmp_path):
    assert "No such file" in only(tmp_path / "none.yaml").asked
    assert "gpt" in os.listdir(only(tmp_path / "none.yaml").change.rpartition(" ")[2])
    assert "directory" in only(tmp_path).asked
    (tmp_path / "latin.yaml").write_bytes(b"run: \xff\xfe\n")
    assert "UTF-8" in only(tmp_path / "latin.yaml").asked
    (tmp_path / "large.yaml").write_bytes(b"#" * (2**20 + 1))
    assert "1048576 bytes" in only(tmp_path / "large.yaml").asked


@pytest.mark.parametrize("section", ["run", "model", "data", "parallel"])
def test_section_that_is_no_section(write, section):
    values = yaml.safe_load(GOOD) | {section: 5}
    assert only(write(yaml.safe_dump(values))).where.startswith(f"{section} (line")


def test_missing_sections_name_what_they_need(write):
    wheres = [problem.where for problem in problems_of(write("run:\nprecision: {compute: bf16}\n"))]
    assert wheres == ["run.dir (line 1)", "run.steps (line 1)", "model.vocab_size", "model.sequence_length",
                      "model.layers", "model.hidden", "model.heads", "objective.name", "parallel.micro_batch",
                      "parallel.global_batch", "optimizer.lr"]


def test_run_folder_must_be_writable(write, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert "is a file" in only(write(GOOD), f"run.dir={tmp_path}/file").asked
    assert "is a file" in only(write(GOOD), f"run.dir={tmp_path}/file/below/it").asked
    assert "run.dir" in only(write(GOOD), 'run.dir="a\\0b"').where
    assert "run.dir" in only(write(GOOD), f"run.dir={'x' * 5000}").where
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    problem = only(write(GOOD))
    assert f"inside {tmp_path}" in problem.asked
    assert not (tmp_path / "run").exists(), "checking creates nothing"


def test_problems_of_a_config_once_the_world_is_known(write):
    config = load_config(write(GOOD))
    assert [problem.where for problem in config.problems(8)] == ["parallel.global_batch"]
    assert config.problems(None) == []
    assert [problem.where for problem in config.machine_problems()] == ["data.train"]


def test_rendered_problems_are_numbered():
    text = render([Problem("a.b", "x", "y", "z"), Problem("c.d", "1", "2", "3")], "file.yaml")
    assert text.splitlines()[0] == "file.yaml: 2 problems"
    assert "  1. a.b\n       asked     x\n       possible  y\n       change    z\n  2. c.d\n" in text


def start(*argv: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=300, check=False,
                          cwd=Path(__file__).parents[3], env={**os.environ, **environ})


def test_the_command_says_it_all_with_exit_code_2_and_no_traceback(write):
    path = write(GOOD.replace("tensor: 1", "tensr: 1"))
    done = start("-m", "pretrain", "train", str(path), "run.steps=0", "--nproc", "3", "run.sed=1")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(f"{path}: 4 problems\n")
    for words in ("did you mean parallel.tensor?", "did you mean run.seed?", "run.steps (command line)", "data.train"):
        assert words in done.stderr


def test_a_refused_config_never_imports_torch(write):
    code = ("import sys; from pretrain.cli import main; code = main(sys.argv[1:]);"
            "sys.exit(99 if 'torch' in sys.modules or 'numpy' in sys.modules else code)")
    assert start("-c", code, "train", str(write(GOOD)), "run.steps=0").returncode == 2


def test_help_and_unknown_verbs(write):
    done = start("-m", "pretrain", "--help")
    assert done.returncode == 0
    assert "train" in done.stdout
    assert start("-m", "pretrain").returncode == 2
    done = start("-m", "pretrain", "trian")
    assert done.returncode == 2
    assert "invalid choice" in done.stderr
    done = start("-m", "pretrain", "train", str(write(GOOD)), "--nprocs", "2")
    assert done.returncode == 2
    assert "--nprocs" in done.stderr


@pytest.mark.parametrize(("argv", "environ", "words"), [
    (["--nproc", "0"], {}, "at least 1 rank"),
    (["--nproc", "2"], {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "leave --nproc out"),
    ([], {"RANK": "0"}, "half set"),
])
def test_train_refuses_a_world_that_cannot_be(write, argv, environ, words):
    done = start("-m", "pretrain", "train", str(write(GOOD)), *argv, **environ)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
