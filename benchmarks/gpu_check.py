"""What must hold on one GPU, and how fast two models train there: `make gpu-check`, about eight minutes.

    python benchmarks/gpu_check.py [--json] [--only WORDS] [--skip-speed]
    python benchmarks/gpu_check.py --device cpu --tiny        # the same without a GPU: smaller models, fp16 left out

Part one trains a small GPT twice for each row, once plainly and once with what the row names, on the same tokens from
the same weights, and compares every loss. Part two trains the shapes of `configs/gpt/` for a few steps in bf16 and
prints tokens per second, MFU and peak memory. Tokens are made up, so nothing has to be prepared.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from parallel.layout import Layout
from parallel.process_groups import Groups, build_groups, destroy_groups
from parallel.ranks.rank_info import alone
from parallel.ranks.rendezvous import join, leave
from pretrain.config.config_file import RawConfig, apply_overrides
from pretrain.config.run_config import RunConfig, config_from, load_config
from pretrain.training.metrics import mfu, throughput
from pretrain.training.third_party_output import third_party_output

ROOT = Path(__file__).parents[1]
SMALL = {"layers": 4, "hidden": 512, "heads": 8, "vocab_size": 8192, "sequence_length": 256}
TINY = {"layers": 2, "hidden": 64, "heads": 4, "vocab_size": 512, "sequence_length": 32}
STEPS, WARM_UP_STEPS, SPEED_STEPS = 20, 2, 6
EXACT, HALF, KERNELS = 1e-5, 2e-2, 1e-3  # bounds: another order of sums; bf16 or fp16; another device's kernels
LAST_START_SECONDS = 330  # a measurement that begins later would pass the eight minutes


@dataclass(frozen=True)
class Check:
    """Two curves and how far their losses may be apart, relative. `device`: where the second one runs, None: alike."""

    name: str
    changed: tuple[str, ...]
    plain: tuple[str, ...] = ()
    bound: float = EXACT
    compiled: bool = False
    reference_device: str | None = None


ON_DEVICES_ONLY = {"precision.compute=fp16", "parallel.offload=parameters"}
EXPERTS = ("model.experts=4", "model.top_k=2", "model.bias=false")
CHECKS = (
    Check("ZeRO 1 against ZeRO 0", ("parallel.zero_stage=1",)),
    Check("ZeRO 3 against ZeRO 0", ("parallel.zero_stage=3",)),
    Check("bf16, ZeRO 0, against fp32", ("precision.compute=bf16",), bound=HALF),
    Check("bf16, ZeRO 1, against fp32", ("precision.compute=bf16", "parallel.zero_stage=1"), bound=HALF),
    Check("fp16, ZeRO 1, against fp32", ("precision.compute=fp16", "parallel.zero_stage=1"), bound=HALF),
    Check("selective recompute against none", ("parallel.recompute=selective",)),
    Check("full recompute against none", ("parallel.recompute=full",)),
    Check("loss in chunks against whole", ("parallel.loss_chunk_tokens=48",)),
    Check("optimizer in host memory against none there", ("parallel.zero_stage=1", "parallel.offload=optimizer"),
          bound=KERNELS),
    Check("weights in host memory against none there", ("parallel.zero_stage=3", "parallel.offload=parameters"),
          bound=KERNELS),
    Check("experts in bf16 (grouped products) against fp32", (*EXPERTS, "precision.compute=bf16"), EXPERTS, HALF),
    Check("experts against the CPU", EXPERTS, EXPERTS, KERNELS, reference_device="cpu"),
    Check("compiled blocks against eager", (), compiled=True, bound=KERNELS),
    Check("this device against the CPU", (), bound=KERNELS, reference_device="cpu"),
)


@dataclass(frozen=True)
class Speed:
    """A model, the settings that make it fit into one device, and how many sequences a step takes."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    compiled: bool = False


ONE = ("parallel.tensor=1", "parallel.sequence=false", "precision.compute=bf16")
# 6.7 billion parameters at ZeRO 1 on one rank take 18 bytes each (bf16 weight; fp32 master, gradient sum and two
# moments), 112 GiB: full recompute leaves room for activations on a device of 139 GiB, and nothing is offloaded.
SPEEDS = (
    Speed("GPT 1.3B", "gpt3-1.3b.yaml", (*ONE, "parallel.zero_stage=1", "parallel.recompute=selective",
                                         "parallel.micro_batch=8", "parallel.global_batch=32")),
    Speed("GPT 1.3B, compiled blocks", "gpt3-1.3b.yaml", (*ONE, "parallel.zero_stage=1", "parallel.recompute=selective",
                                                          "parallel.micro_batch=8", "parallel.global_batch=32"), True),
    Speed("GPT 6.7B", "gpt3-6.7b.yaml", (*ONE, "parallel.zero_stage=1", "parallel.recompute=full",
                                         "parallel.micro_batch=4", "parallel.global_batch=16")),
)
TINY_SPEEDS = (Speed("GPT tiny", "tiny.yaml", ("precision.compute=bf16", "parallel.zero_stage=1")),)


@dataclass(frozen=True)
class Row:
    """One line of the first table; `difference` is None where the check could not run, and `note` says why."""

    name: str
    difference: float | None
    bound: float
    note: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error and (self.difference is None or self.difference <= self.bound)


@dataclass(frozen=True)
class SpeedRow:
    """One line of the second table. Peak bytes are what torch's allocator held at most, None on a CPU."""

    name: str
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak_bytes: int | None = None
    note: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smaller models, for a machine without a GPU")
    parser.add_argument("--only", default="", metavar="WORDS", help="only the comparisons whose name holds these words")
    parser.add_argument("--skip-speed", action="store_true", help="only the comparisons")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    args = parser.parse_args()
    checks = [check for check in CHECKS if args.only in check.name]
    if not checks:
        names = ", ".join(check.name for check in CHECKS)
        parser.error(f"--only {args.only}: no comparison has these words; there are: {names}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny runs the same on the CPU")
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if args.device == "cuda" else "cpu"
    started = time.monotonic()
    with (tempfile.TemporaryDirectory() as folder, third_party_output(Path(folder) / "log"), one_rank() as groups):
        rows = list(compared(checks, groups, device, TINY if args.tiny else SMALL))
        speeds = TINY_SPEEDS if args.tiny else SPEEDS
        measured = [] if args.skip_speed else list(timed(groups, device, name, speeds, started))
    if args.json:
        print(json.dumps({"device": name, "torch": torch.__version__, "checks": [asdict(row) for row in rows],
                          "speeds": [asdict(row) for row in measured], "seconds": time.monotonic() - started}))
    else:
        print_tables(name, rows, measured, time.monotonic() - started)
    return 0 if all(row.ok for row in rows) else 1


@contextmanager
def one_rank() -> Iterator[Groups]:
    """One process group for all engines, with NCCL where there is a GPU."""
    join(alone())
    try:
        yield build_groups(Layout())
    finally:
        destroy_groups()
        leave()


def compared(checks: Sequence[Check], groups: Groups, device: torch.device, model: dict) -> Iterator[Row]:
    """Part one. Each curve is trained once."""
    known: dict[tuple, list[float]] = {}

    def curve(overrides: tuple[str, ...], compiled: bool, where: torch.device) -> list[float]:
        key = (overrides, compiled, where)
        if key not in known:
            known[key] = losses(groups, where, model, overrides, compiled)
        return known[key]

    for check in checks:
        if device.type == "cpu" and (check.reference_device or not ON_DEVICES_ONLY.isdisjoint(check.changed)):
            yield Row(check.name, None, check.bound, "needs a GPU")
            continue
        reference = torch.device(check.reference_device) if check.reference_device else device
        try:
            plain, changed = curve(check.plain, False, reference), curve(check.changed, check.compiled, device)
        except Exception as error:  # the other rows are wanted all the same
            yield Row(check.name, None, check.bound, error=_first_line(error))
            continue
        if plain[-1] > plain[0] - 0.3:
            yield Row(check.name, None, check.bound, error=f"did not learn: {plain[0]:.3f} to {plain[-1]:.3f}")
            continue
        yield Row(check.name, max(abs(a - b) / b for a, b in zip(changed, plain, strict=True)), check.bound)


def small_config(model: dict, overrides: Sequence[str]) -> RunConfig:
    raw = RawConfig("gpu-check")
    raw.values = {
        "run": {"dir": "unused", "steps": STEPS, "seed": 11}, "model": {"family": "gpt", **model},
        "objective": {"name": "causal_lm"}, "data": {"train": "unused"},
        "parallel": {"micro_batch": 4, "global_batch": 8}, "optimizer": {"lr": 1e-3, "clip_norm": 1.0},
    }  # fmt: skip
    apply_overrides(raw, overrides)
    return config_from(raw.values, "gpu-check")


def losses(groups: Groups, device: torch.device, model: dict, overrides: Sequence[str], compiled: bool) -> list[float]:
    """The loss of every step."""
    config = small_config(model, overrides)
    return [loss for loss, _ in trained(config, groups, device, compiled, STEPS)]


def timed(groups: Groups, device: torch.device, device_name: str, speeds: Sequence[Speed], started: float
          ) -> Iterator[SpeedRow]:
    """Part two."""
    for speed in speeds:
        if time.monotonic() - started > LAST_START_SECONDS:
            yield SpeedRow(speed.name, note=f"not begun after {LAST_START_SECONDS} s")
            continue
        config = load_config(ROOT / "configs" / "gpt" / speed.recipe, speed.overrides)
        tokens = config.parallel.global_batch * config.model.sequence_length
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            steps = trained(config, groups, device, speed.compiled, WARM_UP_STEPS + SPEED_STEPS)
        except torch.OutOfMemoryError as error:
            yield SpeedRow(speed.name, note=_first_line(error))
            continue
        rate = throughput(tokens, statistics.median(seconds for _, seconds in steps[WARM_UP_STEPS:]))
        flops = config.spec.flops_per_unit(config.model, config.model.sequence_length)
        yield SpeedRow(speed.name, rate, mfu(flops, rate, device_name, 1, dtype=config.precision.compute),
                       torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
                       " ".join(speed.overrides))


def trained(config: RunConfig, groups: Groups, device: torch.device, compiled: bool, num_steps: int
            ) -> list[tuple[float, float]]:
    """(loss, seconds) of every step. `compiled`: each block goes through torch.compile. All memory is given back."""
    # DeepSpeed prints as soon as it is imported, so not before its output is redirected.
    from pretrain.training.build_engine import build_engine

    engine = build_engine(config, groups, device)
    if compiled:
        for spec in engine.stage.specs:
            if spec.recompute:  # the blocks
                engine.stage.by_name[spec.name].compile()
    steps = []
    for step in range(1, num_steps + 1):
        data = batches(config, step)
        begun = time.perf_counter()
        loss = engine.train_step(data, step, config.optimizer.lr).loss  # a number, so the device has finished
        steps.append((loss, time.perf_counter() - begun))
    engine.close()
    del engine
    gc.collect()  # an engine refers to itself
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return steps


def batches(config: RunConfig, step: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of a made-up language: most tokens follow from the one before, so there is something to learn."""
    samples, length, vocab = config.parallel.global_batch, config.model.sequence_length + 1, config.model.vocab_size
    generator = torch.Generator().manual_seed(step)
    known = torch.randint(64, (samples, 1), generator=generator)
    columns = [known]
    surprises = torch.randint(64, (samples, length), generator=generator)
    surprised = torch.rand(samples, length, generator=generator) < 0.1
    for place in range(1, length):
        columns.append(torch.where(surprised[:, place : place + 1], surprises[:, place : place + 1],
                                   (5 * columns[-1] + 7) % min(64, vocab)))
    return [{"tokens": part} for part in torch.cat(columns, dim=1).split(config.parallel.micro_batch)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def print_tables(device_name: str, rows: Sequence[Row], speeds: Sequence[SpeedRow], seconds: float) -> None:
    print(f"{device_name}, torch {torch.__version__}\n")
    print("| check | largest relative difference of a loss | allowed | |\n| --- | --- | --- | --- |")
    for row in rows:
        found = "-" if row.difference is None else f"{row.difference:.1e}"
        print(f"| {row.name} | {found} | {row.bound:.0e} | {row.error or row.note or ('ok' if row.ok else 'FAILED')} |")
    if speeds:
        print("\n| model | tokens/s | MFU | peak GiB | settings |\n| --- | --- | --- | --- | --- |")
    for row in speeds:
        rate = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        used = "-" if row.mfu is None else f"{row.mfu:.1%}"
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}"
        print(f"| {row.name} | {rate} | {used} | {peak} | {row.note} |")
    print(f"\n{seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
