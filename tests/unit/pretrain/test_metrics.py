"""metrics.jsonl on real files, throughput and utilisation."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.loss_terms import Losses
from parallel.planner.hardware import DEVICES, find_device, peak_flops
from pretrain.training.metrics import MetricsWriter, counted_in, loss_fields, mfu, read_metrics, term_names, throughput


def write(path, steps, resumed_step=0):
    writer = MetricsWriter(path, resumed_step)
    for step in steps:
        writer.write({"step": step, "loss": 1.0 / step})
    writer.close()


def steps_of(path):
    return [record["step"] for record in read_metrics(path)]


def test_every_line_is_on_file_before_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        writer.write({"step": step, "loss": 0.5})
        assert steps_of(tmp_path / "metrics.jsonl") == list(range(1, step + 1))


def test_resume_drops_what_is_trained_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 9))
    write(path, range(6, 11), resumed_step=5)
    assert steps_of(path) == list(range(1, 11))


@given(done=st.integers(0, 12), saved=st.integers(0, 12), cut=st.integers(0, 40))
def test_no_step_twice_wherever_the_kill_fell(tmp_path_factory, done, saved, cut):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write(path, range(1, done + 1))
    os.truncate(path, max(0, path.stat().st_size - cut))
    write(path, range(saved + 1, 15), resumed_step=saved)
    steps = steps_of(path)
    assert len(set(steps)) == len(steps) and steps[-1] == 14
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_half_written_last_line_is_left_out_and_then_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, (1, 2))
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    assert steps_of(path) == [1, 2]
    write(path, (3,), resumed_step=2)
    assert path.read_text().count("\n") == 3 and steps_of(path) == [1, 2, 3]


def test_a_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    write(path, (3,), resumed_step=2)
    assert steps_of(path) == [1, 2, 3]


def test_damage_in_the_middle_is_left_out_with_a_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\xff\n[3]\n{"step": 4}\n')
    assert steps_of(path) == [1, 4]
    assert "line 2 is damaged" in caplog.text


def test_records_survive_kill_9(tmp_path):
    path = tmp_path / "metrics.jsonl"
    script = (
        "import sys; from pathlib import Path; from pretrain.training.metrics import MetricsWriter\n"
        "writer = MetricsWriter(Path(sys.argv[1])); step = 0\n"
        "while True:\n"
        "    step += 1; writer.write({'step': step, 'loss': 1.5})\n"
        "    if step == 100: print('written', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    steps = steps_of(path)
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 100


def test_a_step_cannot_be_written_twice(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write({"step": 3})
    with pytest.raises(ValueError, match="already holds step 3"):
        writer.write({"step": 3})


def test_lines_are_json_even_for_a_loss_that_is_no_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 1e-4})
    assert read_metrics(path) == [{"step": 1, "loss": None, "grad_norm": None, "lr": 1e-4}]


def test_a_missing_file_has_no_records(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_terms_stand_beside_the_loss_where_there_are_several():
    one, two = Losses(2.0, {"a": 2.0}), Losses(2.5, {"a": 2.0, "b": None})
    assert loss_fields("loss", one) == {"loss": 2.0}
    record = loss_fields("heldout_loss", two)
    assert record == {"heldout_loss": 2.5, "heldout_loss/a": 2.0, "heldout_loss/b": None}
    assert term_names(record, "heldout_loss") == ["heldout_loss/a", "heldout_loss/b"]
    assert term_names(record, "loss") == []


def test_throughput_and_units():
    assert throughput(1000, 0.5) == 2000.0 and throughput(1000, 0.0) == 0.0
    assert counted_in({"tokens": 1}) == "tokens" and counted_in({"samples": 1}) == "samples"


def test_mfu_is_model_flops_over_the_peak_of_all_devices():
    # Half the peak of two A100s: 6e9 FLOPs a token, 52,000 tokens a second.
    assert mfu(6e9, 52_000, "NVIDIA A100-SXM4-80GB", 2, dtype="bf16") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("cpu", "fp32"),
        ("", "bf16"),
        ("Tesla V100-SXM2-16GB", "bf16"),
        ("NVIDIA A100-SXM4-80GB", "int8"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("NVIDIA GH200 480GB", "bf16"),
        ("NVIDIA GB200", "bf16"),
        ("NVIDIA A100-SXM-64GB", "bf16"),
    ],
)
def test_no_peak_is_guessed(name, dtype):
    assert mfu(6e9, 1000, name, 1, dtype=dtype) is None


@pytest.mark.parametrize(
    ("name", "device", "bf16_or_fp16_tflops"),
    [
        ("Tesla V100-PCIE-32GB", "V100 PCIe", 112),
        ("Tesla V100-SXM2-32GB", "V100 SXM", 125),
        ("Tesla V100S-PCIE-32GB", "V100S", 130),
        ("NVIDIA A100 80GB PCIe", "A100", 312),
        ("A100-SXM4-40GB", "A100", 312),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.4),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756),
        ("NVIDIA H100 NVL", "H100 NVL", 835.5),
        ("NVIDIA H200", "H200 SXM", 989.5),
        ("NVIDIA H200 NVL", "H200 NVL", 835.5),
        ("NVIDIA B200", "B200", 2250),
    ],
)
def test_devices_by_the_names_torch_reports(name, device, bf16_or_fp16_tflops):
    assert find_device(name).name == device
    assert peak_flops(name, "fp16") == pytest.approx(bf16_or_fp16_tflops * 1e12)


def test_half_precision_is_faster_than_fp32_on_every_device():
    assert all(d.peak_flops["fp16"] > 5 * d.peak_flops["fp32"] for d in DEVICES if "fp32" in d.peak_flops)
