"""Bytes measured in the real engine against the formulas of parallel/planner/memory.py."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import pytest

from parallel.planner.memory import state_bytes
from pretrain.models import family_spec
from pretrain.models.shapes import activations
from tests.helpers.ranks import run_ranks
from tests.helpers.recipes import GPT

pytestmark = pytest.mark.slow

SEQUENCE_LENGTH, MICRO_BATCH, HIDDEN, HEADS, BLOCKS, VOCAB_SIZE = 64, 8, 64, 4, 4, 512
STATES = [(compute, stage) for stage in (0, 1, 2, 3) for compute in ("fp32", "bf16")]
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rotary", "bias": False}
RUNS = [(shape, recompute) for shape in ({}, DROPOUT, LLAMA) for recompute in ("none", "selective", "full")]


def open_engine(groups, model: dict, parallel: dict, compute: str = "fp32"):
    import torch

    from pretrain.config.run_config import config_from
    from pretrain.training.build_engine import build_engine

    values = {**GPT, "model": {**GPT["model"], **model}, "parallel": parallel, "precision": {"compute": compute},
              "data": {"train": "none"}}
    return build_engine(config_from(values, "test"), groups, torch.device("cpu"))


def joined(info, tensor: int = 1, sequence: bool = False):
    from parallel.layout import Layout
    from parallel.process_groups import build_groups
    from parallel.ranks.rendezvous import join

    join(info)
    return build_groups(Layout(tensor=tensor, data=info.world_size // tensor, sequence=sequence))


def bytes_of(tensors) -> dict[int, int]:
    """Bytes by storage: two views of the same memory count once."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def states_of(engine) -> dict[str, int]:
    """Bytes of weights and optimizer state, and of all other tensors of this process: gradients and buffers."""
    parameters = [slot.parameter for slot in engine.slots.values()]
    weights = bytes_of([*(p.data for p in parameters), *(getattr(p, "ds_tensor", None) for p in parameters)])
    optimizer = bytes_of(f.tensor for kind in ("weight", "exp_avg", "exp_avg_sq") for f in engine.state.fragments(kind))
    gc.collect()
    everything = bytes_of(found for found in gc.get_objects() if _is_tensor(found))
    return {"weights": sum(weights.values()),
            "optimizer": sum(size for place, size in optimizer.items() if place not in weights),
            "others": sum(size for place, size in everything.items() if place not in weights | optimizer)}


def _is_tensor(found) -> bool:
    import torch

    return type(found) in (torch.Tensor, torch.nn.Parameter)


def measure_states(info, compute: str, stage: int, freeze: list[str]) -> tuple[dict[str, int], int, int, int]:
    """(largest bytes by kind over a step, trained parameters, frozen ones, those that ZeRO-3 keeps whole)."""
    import torch

    groups = joined(info)
    parallel = {"micro_batch": 1, "global_batch": 8, "zero_stage": stage}
    engine = open_engine(groups, {"hidden": 192, "freeze": freeze}, parallel, compute)
    numels = {True: 0, False: 0}
    for slot in engine.slots.values():
        numels[slot.parameter.plan.trainable] += getattr(slot.parameter, "ds_numel", slot.parameter.numel())
    batches = [{"tokens": torch.randint(VOCAB_SIZE, (1, 33))} for _ in range(2)]
    engine.train_step(batches, 1, 1e-3)
    largest: dict[str, int] = {}
    clip, step = engine.step_hooks.clip, engine.deepspeed.step

    def look() -> None:
        for kind, size in states_of(engine).items():
            largest[kind] = max(size, largest.get(kind, 0))

    def after_backward() -> None:
        if not engine.deepspeed.is_gradient_accumulation_boundary():
            look()
        step()

    def before_optimizer() -> None:
        look()
        clip()

    engine.step_hooks.clip, engine.deepspeed.step = before_optimizer, after_backward
    engine.train_step(batches, 2, 1e-3)
    kept = getattr(engine.deepspeed.optimizer, "persistent_parameters", [])
    return largest, numels[True], numels[False], sum(parameter.ds_numel for parameter in kept)


@pytest.mark.parametrize(("compute", "stage", "freeze"), [
    *((*state, []) for state in STATES),
    *((*state, ["embedding.*", "blocks.0.*", "blocks.1.*"]) for state in (("fp32", 0), ("bf16", 1), ("bf16", 3))),
])  # fmt: skip
def test_model_states(compute, stage, freeze):
    for found, num_parameters, num_frozen, num_gathered in run_ranks(measure_states, 4, compute, stage, freeze):
        expected = state_bytes(num_parameters, stage, 4, compute, num_gathered=num_gathered, num_frozen=num_frozen)
        assert found["weights"] == pytest.approx(expected.weights, rel=0.03)
        assert found["optimizer"] == pytest.approx(expected.optimizer + expected.host, rel=0.03)  # all on one host
        assert found["others"] == pytest.approx(expected.gradients + expected.communication, rel=0.03)


class MallInfo2(ctypes.Structure):
    """What glibc's mallinfo2 fills in."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks",
                                                     "fsmblks", "uordblks", "fordblks", "keepcost")]


def allocated_bytes() -> int:
    """What the allocator has handed out and not got back, in all arenas.

    Not the resident memory: that also holds pages which the allocator keeps for later, and huge pages which the kernel
    makes of small ones when it has the time, so it changes with what else the machine does.
    """
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallInfo2
    told = libc.mallinfo2()
    return told.uordblks + told.hblkhd


def private_copies(folder: str) -> tuple[int, int]:
    """(bytes of this process's mappings of files in a folder, bytes of them that lie in memory of its own)."""
    mapped, anonymous, inside = 0, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if re.match(r"[0-9a-f]+-[0-9a-f]+$", words[0]):
            inside = f"{folder}/" in line
        elif inside and words[0] == "Size:":
            mapped += 1024 * int(words[1])
        elif inside and words[0] == "Anonymous:":
            anonymous += 1024 * int(words[1])
    return mapped, anonymous


def measure_allocated(info, parallel: dict) -> tuple[int, int, tuple[int, int]]:
    """(bytes allocated once the states exist and one step is done, parameters, what `private_copies` says)."""
    import torch

    engine = open_engine(joined(info), {"hidden": 512}, {"micro_batch": 1, "global_batch": 1, **parallel})
    engine.train_step([{"tokens": torch.randint(VOCAB_SIZE, (1, 33))}], 1, 1e-3)
    gc.collect()
    parameters = [slot.parameter for slot in engine.slots.values()]
    num_parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
    return allocated_bytes(), num_parameters, private_copies(parallel.get("offload_folder", "/nowhere"))


@pytest.mark.parametrize("stage", [1, 3])
def test_states_in_files_take_no_memory(stage, tmp_path):
    """12 bytes for each parameter: master weights and two moments."""
    parallel = {"zero_stage": stage, "offload": "optimizer"}
    (in_memory, num_parameters, _), = run_ranks(measure_allocated, 1, parallel)
    (in_files, _, (mapped, anonymous)), = run_ranks(measure_allocated, 1, {**parallel, "offload_folder": str(tmp_path)})
    assert in_memory - in_files == pytest.approx(12 * num_parameters, rel=0.005)
    assert mapped >= 12 * num_parameters
    assert anonymous == 0, "a mapping that is written to is copied into memory"


def model_of(shape: dict) -> dict:
    return {"layers": BLOCKS, "hidden": HIDDEN, "heads": HEADS, "sequence_length": SEQUENCE_LENGTH,
            "vocab_size": VOCAB_SIZE, **shape}


def measure_activations(info, tensor: int, sequence: bool) -> list[tuple[int, int]]:
    """(bytes alive between forward and backward, largest bytes) of each of RUNS, where gradients exist already."""
    import torch

    from tests.helpers.live_bytes import LiveBytes

    groups, found = joined(info, tensor, sequence), []
    for shape, recompute in RUNS:
        engine = open_engine(groups, model_of(shape), {"micro_batch": MICRO_BATCH, "global_batch": 4 * MICRO_BATCH,
                                                       "tensor": tensor, "sequence": sequence,
                                                       "recompute": recompute})
        micro_batch, = engine.terms.for_evaluation(
            [{"tokens": torch.randint(VOCAB_SIZE, (MICRO_BATCH, SEQUENCE_LENGTH + 1))}])
        for _ in range(2):
            with LiveBytes() as live:
                loss = engine.deepspeed(micro_batch.inputs, engine.terms.of(micro_batch))
                kept = live.current_bytes
                engine.deepspeed.backward(loss)
            del loss
        found.append((kept, live.peak_bytes))
        engine.close()
    return found


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_activations(tensor, sequence):
    measured = run_ranks(measure_activations, tensor, tensor, sequence)[0]
    for (shape, recompute), (kept, peak) in zip(RUNS, measured, strict=True):
        spec = family_spec("gpt")
        block = spec.blocks(spec.config_class(**model_of(shape)))[0]
        formula = activations(block, vocab_size=VOCAB_SIZE, micro_batch=MICRO_BATCH, element_bytes=4, tensor=tensor,
                              sequence=sequence, fused=False)
        assert kept == pytest.approx(formula.kept(BLOCKS, recompute), rel=0.1), (shape, recompute)
        assert peak == pytest.approx(formula.peak(BLOCKS, recompute), rel=0.1), (shape, recompute)
