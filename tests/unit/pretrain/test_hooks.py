"""Hooks on a real run folder: files, picture, TensorBoard events and what the person reads."""

import io
import json
import logging
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.image import imread

from common.wording import duration, short_number
from parallel.layout import Layout
from pretrain.training.hooks import (
    ConsoleHook,
    CurveHook,
    Hook,
    Hooks,
    MetricsFileHook,
    TensorBoardHook,
    standard_hooks,
)
from pretrain.training.hooks.console import banner
from pretrain.training.hooks.curve import draw_curve, smoothed
from pretrain.training.metrics import read_metrics


def make_run(folder, start_step=0, total_steps=20, is_main=True):
    config = SimpleNamespace(
        run=SimpleNamespace(check_every=0),
        model=SimpleNamespace(family="gpt"),
        objective=SimpleNamespace(name="causal_lm"),
        log=SimpleNamespace(every=5, tensorboard=True),
        parallel=SimpleNamespace(zero_stage=1, offload="none", recompute="none", micro_batch=2, global_batch=16),
        precision=SimpleNamespace(compute="fp32"),
    )
    return SimpleNamespace(
        config=config, layout=Layout(tensor=2, data=2), rank=0, world_size=4,
        folder=Path(folder), is_main=is_main, start_step=start_step, total_steps=total_steps,
        num_parameters=124_439_808, num_active_parameters=124_439_808, tokens_per_step=2048, device_name="cpu",
        node="here", engine=None,
    )  # fmt: skip


def step_record(step, unit="tokens"):
    return {
        "step": step, "loss": 8.0 / step, "grad_norm": 1.0, "lr": 1e-4 * step, unit: 2048 * step,
        "step_seconds": 2.0, f"{unit}_per_second": 1024.0,
    }  # fmt: skip


def train(hooks, run, reason="done", unit="tokens"):
    hooks.on_start(run)
    for step in range(run.start_step + 1, run.total_steps + 1):
        hooks.on_step_end(run, step_record(step, unit))
        if step % 10 == 0:
            hooks.on_evaluation(run, {"step": step, unit: 2048 * step, "heldout_loss": 9.0 / step})
            hooks.on_checkpoint(run, run.folder / "checkpoints" / f"step-{step}", step)
    hooks.on_end(run, reason)


class Noting(Hook):
    def __init__(self, name, notes, failure=None):
        self.name, self.notes, self.failure = name, notes, failure

    def on_start(self, run):
        self.notes.append(f"{self.name} start")

    def on_end(self, run, reason):
        self.notes.append(f"{self.name} end {reason}")
        if self.failure:
            raise self.failure


def test_hooks_are_called_in_the_order_given(tmp_path):
    notes = []
    hooks = Hooks([Noting("b", notes), Noting("a", notes)])
    train(hooks, make_run(tmp_path), reason="done")
    assert notes == ["b start", "a start", "b end done", "a end done"]


def test_every_hook_gets_its_end_and_the_first_failure_is_raised(tmp_path):
    notes = []
    hooks = Hooks([Noting("a", notes, OSError("first")), Noting("b", notes, ValueError("second")), Noting("c", notes)])
    with pytest.raises(OSError, match="first"):
        hooks.on_end(make_run(tmp_path), "stopped")
    assert notes == ["a end stopped", "b end stopped", "c end stopped"]


def test_other_ranks_write_and_say_nothing(tmp_path, capfd):
    run = make_run(tmp_path, is_main=False)
    train(standard_hooks(run.config), run)
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", "")


def test_the_run_folder_after_a_run_and_after_a_resume(tmp_path):
    first = make_run(tmp_path, total_steps=14)
    train(standard_hooks(first.config), first)
    second = make_run(tmp_path, start_step=10, total_steps=20)
    train(standard_hooks(second.config), second)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 21))
    assert [record["step"] for record in read_metrics(tmp_path / "evaluations.jsonl")] == [10, 20]
    assert "resumes    after step 10 of 20" in (tmp_path / "logs" / "train.log").read_text()
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    assert not list(tmp_path.glob(".curve*"))


def test_a_run_that_ends_before_it_starts_leaves_no_trouble(tmp_path):
    run = make_run(tmp_path)
    standard_hooks(run.config).on_end(run, "failed")


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(TensorBoardHook(), make_run(tmp_path, total_steps=14))
    train(TensorBoardHook(), make_run(tmp_path, start_step=10, total_steps=20))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 21))
    assert [event.step for event in events.Scalars("heldout_loss")] == [10, 20]
    assert {"grad_norm", "lr", "tokens_per_second"} <= set(events.Tags()["scalars"])


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    train(ConsoleHook(), make_run(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    steps = [line[21:] for line in lines if "  loss " in line and "  step " in line]
    assert [line.split()[1] for line in steps] == ["1/20", "5/20", "10/20", "15/20", "20/20"]
    assert steps[1] == "step 5/20  loss 1.6000  grad norm 1.000  lr 5.00e-04  1,024 tokens/s  30 s left"
    assert any("held-out loss 0.9000" in line for line in lines)
    assert any(line.endswith("checkpoint checkpoints/step-20") for line in lines)
    assert any(line.startswith("Done: 20 steps") for line in lines)
    assert f"  checkpoint {tmp_path}/checkpoints/step-20" in lines
    assert (tmp_path / "logs" / "train.log").read_text().splitlines() == lines


def test_terms_of_a_loss_reach_the_person_and_tensorboard(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run(tmp_path, total_steps=2)
    hooks = Hooks([TensorBoardHook(), ConsoleHook()])
    hooks.on_start(run)
    for step, pairs in ((1, 0.7), (2, None)):
        hooks.on_step_end(run, {**step_record(step), "loss/masked_lm": 7.5, "loss/next_sentence": pairs})
    hooks.on_evaluation(run, {"step": 2, "tokens": 4096, "heldout_loss": 8.0, "heldout_loss/masked_lm": 7.25,
                              "heldout_loss/next_sentence": 0.75})
    hooks.on_end(run, "done")
    told = capsys.readouterr().out
    assert "step 1/2  loss 8.0000 (masked_lm 7.5000, next_sentence 0.7000)  grad norm" in told
    assert "  loss       8.0000 -> 4.0000 (masked_lm 7.5000, next_sentence -)" in told
    assert "  held-out   8.0000 (masked_lm 7.2500, next_sentence 0.7500)" in told
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/masked_lm")] == [1, 2]
    assert [event.step for event in events.Scalars("loss/next_sentence")] == [1]
    assert [event.step for event in events.Scalars("heldout_loss/next_sentence")] == [2]


def test_a_stop_says_where_and_why(tmp_path, capsys):
    hook, run = ConsoleHook(), make_run(tmp_path)
    hook.on_start(run)
    hook.on_step_end(run, step_record(1))
    hook.on_end(run, "the time limit is near")
    out = capsys.readouterr().out
    assert "Stopped at step 1 of 20 after 0 s: the time limit is near" in out
    assert "none written by this process" in out


def test_samples_where_a_family_has_no_tokens(tmp_path, capsys):
    run = make_run(tmp_path)
    train(Hooks([MetricsFileHook(), CurveHook(), ConsoleHook()]), run, unit="samples")
    assert "1,024 samples/s" in capsys.readouterr().out
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("size", [(24, 80), pytest.param((0, 0), marks=pytest.mark.slow)])
def test_one_live_line_on_a_terminal(tmp_path, size):
    script = (
        "import sys; from tests.unit.pretrain.test_hooks import *\n"
        "from pretrain.training.hooks import console; console.REFRESH_SECONDS = 0.0\n"
        "train(ConsoleHook(), make_run(sys.argv[1]))\n"
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, size)
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        seen = io.BytesIO()
        try:
            while chunk := os.read(ours, 65_536):
                seen.write(chunk)
        except OSError:  # how Linux says that the other end of a pty was closed
            pass
        assert process.wait() == 0
    text = seen.getvalue().decode()
    assert "step 7/20" in text and "loss 1.1429  1,024 tokens/s  26 s left" in text
    assert "grad norm" not in text  # the full lines are for the log file
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor comes back
    assert (tmp_path / "logs" / "train.log").read_text().count("grad norm") == 5


def test_the_banner_tells_of_experts(tmp_path):
    run = make_run(tmp_path)
    run.layout, run.num_active_parameters = Layout(tensor=2, data=2, expert=2), 24_439_808
    facts = dict(banner(run))
    assert facts["parameters"].endswith(f"(124,439,808), {short_number(24_439_808)} met by a token")
    assert facts["layout"] == "tensor 2 × pipeline 1 × data 2 (experts over 2), ZeRO 1, 4 ranks"


def test_the_banner_states_the_facts(tmp_path):
    facts = dict(banner(make_run(tmp_path)))
    assert facts["parameters"] == "124 M (124,439,808)"
    assert facts["each step"] == "2,048 tokens: 16 samples, micro-batches of 2, 4 accumulated"
    assert facts["layout"] == "tensor 2 × pipeline 1 × data 2, ZeRO 1, 4 ranks"
    assert (facts["precision"], facts["device"], facts["steps"]) == ("fp32", "cpu", "20")


def test_words_for_durations_and_numbers():
    assert [duration(s) for s in (0.2, 59.4, 185, 7620, 367_200)] == [
        "0 s", "59 s", "3 min 05 s", "2 h 07 min", "4 d 06 h",
    ]  # fmt: skip
    assert [short_number(n) for n in (950, 12_345, 124e6, 175e9, 1e12)] == ["950", "12.3 k", "124 M", "175 B", "1 T"]


def test_curve_has_both_losses_and_survives_a_loss_that_was_no_number(tmp_path):
    records = [step_record(step) for step in range(1, 200)]
    records[50]["loss"] = None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    without = imread(draw_curve(tmp_path))
    evaluation = {"step": 100, "tokens": 204_800, "heldout_loss": 4.0}
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    picture = imread(draw_curve(tmp_path))
    assert picture.shape[:2] == (900, 1350)
    assert orange_pixels(without) == 0 < orange_pixels(picture)


def orange_pixels(picture):
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    return int(((red > 0.8) & (green < 0.5) & (blue < 0.3)).sum())


def test_no_curve_before_the_first_step(tmp_path):
    assert draw_curve(tmp_path) is None and list(tmp_path.iterdir()) == []


def test_a_curve_that_cannot_be_drawn_warns_once(tmp_path, caplog):
    run = make_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    hook = CurveHook()
    with caplog.at_level(logging.WARNING):
        hook.on_evaluation(run, {})
        hook.on_end(run, "done")
    assert caplog.text.count("curve.png could not be drawn, training is not affected") == 1


def test_smoothing_keeps_a_constant_and_does_not_lag_behind_a_straight_fall():
    assert smoothed([2.0] * 10, 5) == [2.0] * 10
    falling = [float(value) for value in range(100, 0, -1)]
    assert smoothed(falling, 10)[:90] == pytest.approx(falling[:90])
