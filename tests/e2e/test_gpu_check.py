"""`benchmarks/gpu_check.py` where there is no GPU: its comparisons run on the CPU, and it says what it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


def gpu_check(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=600,
                          check=False, cwd=SCRIPT.parents[1])


def test_comparisons_run_on_the_cpu():
    done = gpu_check("--device", "cpu", "--tiny", "--skip-speed", "--json", "--only", "1, against")
    assert done.returncode == 0, done.stderr
    bf16, fp16 = json.loads(done.stdout)["checks"]
    assert 1e-6 < bf16["difference"] <= bf16["bound"], "bf16 has to differ a little from fp32"
    assert fp16["difference"] is None
    assert fp16["note"] == "needs a GPU"


def test_mistakes():
    for words, told in ((["--only", "nothing like it"], "no comparison"), ([], "no CUDA device here")):
        done = gpu_check(*words)
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr
