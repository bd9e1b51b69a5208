"""Initial weights by element: the generator, the distribution, and the same bits for every part of a tensor."""

import os
import subprocess
import sys
from math import prod
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel import parameter_plan
from parallel.normal_numbers import UniformBits, inverse_normal
from parallel.parameter_plan import CHUNK_ELEMENTS, InitialWeights, ParameterPlan, draw, draw_range
from parallel.pipeline_stages import Stage, cut
from parallel.single_rank import single_rank
from parallel.tensor_parallel import TensorParallel
from parallel.tensor_slice import SliceRange, cut_from
from pretrain.config.run_config import load_config
from pretrain.models.build import layer_list

KEY = 0x0123456789ABCDEF_FEDCBA9876543210
FUSED = ((6, 0.5), (2, 0.25), (4, 2.0))  # standard deviations of the rows of query, key and value of a group
MASK = 2**64 - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """One block of Philox4x64-10, from the paper's definition (Salmon et al. 2011, section 3.3)."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        low_a, low_c = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = (low_c >> 64) ^ b ^ k0, low_c & MASK, (low_a >> 64) ^ d ^ k1, low_a & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [a, b, c, d]


def test_the_bits_are_those_of_philox():
    # the known answer for counter and key zero in the authors' test vectors (Random123, kat_vectors)
    assert philox([0, 0, 0, 0], [0, 0]) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B,
                                            0x7E68B68AEC7BA23B]
    for block in (0, 1, 12345, 2**40):
        words = philox([block + 1, 0, 0, 0], [KEY & MASK, KEY >> 64])
        halves = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
        assert UniformBits(KEY).read(8 * block, 8).tolist() == halves


def test_values_never_change():
    """A run that is started again with the same seed has the same weights under every version of this project."""
    found = draw("blocks.0.attention.qkv.weight", (300, 7), ParameterPlan(0.0, 0.02, 0), seed=1234).view(-1)
    assert [found[i].item().hex() for i in (0, 1, 1234, 2099)] == [
        "0x1.46bf8e0000000p-15", "0x1.bff4440000000p-8", "-0x1.87d9680000000p-6", "0x1.cefe540000000p-10"]


def test_the_inverse_is_that_of_the_normal_distribution():
    bits = np.concatenate([np.arange(200), 2**31 + np.arange(-100, 100), 2**32 - 1 - np.arange(200),
                           np.linspace(0, 2**32 - 1, 5001).astype(np.int64)]).astype(np.uint32)
    exact = np.array([NormalDist().inv_cdf((int(number) + 0.5) / 2**32) for number in bits])
    found = inverse_normal(bits)
    assert np.abs(found / exact - 1).max() < 2e-7
    assert np.abs(found).max() < 6.34
    assert np.array_equal(inverse_normal(~bits), -found), "p and 1 - p are opposite to the last bit"


@settings(deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 700), st.data())
def test_an_element_does_not_depend_on_its_neighbours(start, count, data):
    """Any part of a stream, at any alignment in memory, has the bits of the whole."""
    bits = UniformBits(KEY)
    whole = bits.read(start, count)
    first = data.draw(st.integers(0, count - 1))
    length = data.draw(st.integers(1, count - first))
    part = bits.read(start + first, length)  # forwards or backwards
    assert np.array_equal(part, UniformBits(KEY).read(start + first, length))
    assert np.array_equal(part, whole[first : first + length])
    moved = np.empty(length + 3, np.uint32)[data.draw(st.integers(0, 3)) :][:length]
    moved[:] = part
    assert np.array_equal(inverse_normal(moved), inverse_normal(whole)[first : first + length])
    assert inverse_normal(part[:1])[0] == inverse_normal(whole)[first]


@pytest.mark.parametrize("std", [0.02, FUSED], ids=["one std", "std of rows"])
@pytest.mark.parametrize("slice_dim", [None, 0, 1])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_every_slice_and_fragment_has_the_bits_of_the_whole(slice_dim, size, std):
    shape, plan = (96, 1024 + 8), ParameterPlan(1.0, std, slice_dim)
    assert prod(shape) > CHUNK_ELEMENTS
    whole = draw("a", shape, plan, seed=7)
    assert whole.std() > 0
    generator = np.random.default_rng(3)
    for rank in range(size):
        held = SliceRange.slice("a", shape, slice_dim, rank=rank, size=size)
        for ranks in (1, 3, 8):  # that share the flattened slice, cut at any element
            ends = [0, *sorted(generator.choice(held.count, ranks - 1, replace=False).tolist()), held.count]
            pieces = [draw_range(held.part(start, end - start), plan, seed=7)
                      for start, end in zip(ends, ends[1:], strict=False)]
            assert torch.equal(torch.cat(pieces), cut_from(whole, held))


def test_threads_change_nothing():
    part = SliceRange.slice("a", (1000, 4096), 1, rank=1, size=2).part(77, 1_000_003)
    found = []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            found.append(draw_range(part, ParameterPlan(0.0, 1.0, 1), seed=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_rows_of_a_fused_matrix_have_their_own_deviation():
    whole = draw("a", (12 * 40, 256), ParameterPlan(0.0, FUSED, 0), seed=1).view(40, 12, 256)
    for rows, std in ((slice(0, 6), 0.5), (slice(6, 8), 0.25), (slice(8, 12), 2.0)):
        assert whole[:, rows].std().item() == pytest.approx(std, rel=0.02)


def test_padding_of_the_vocabulary_changes_no_row():
    plan = ParameterPlan(0.0, 0.02, 0)
    assert torch.equal(draw("table", (128, 24), plan, 5)[:101], draw("table", (101, 24), plan, 5))


def test_the_numbers_are_normal():
    """Moments and the Kolmogorov-Smirnov distance of a million numbers, to three standard errors and 1 %."""
    count = 1_000_000
    z = draw("a", (count,), ParameterPlan(0.0, 1.0, None), seed=1).double()
    moments = [(z**power).mean().item() for power in (1, 2, 3, 4)]
    for found, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(found - expected) < 3 * (variance / count) ** 0.5
    levels = torch.special.ndtr(z.sort().values)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = max((steps[1:] - levels).max(), (levels - steps[:-1]).max()).item()
    assert distance * count**0.5 < 1.63


def test_numbers_that_should_be_independent_are_not_correlated():
    count = 1_000_000
    plan = ParameterPlan(0.0, 1.0, None)
    z = draw("a", (count,), plan, seed=1).double()
    others = {"a neighbour": z.roll(1), "a lane": z.roll(4), "a block": z.roll(8), "a row": z.roll(4096),
              "another name": draw("b", (count,), plan, 1).double(),
              "another seed": draw("a", (count,), plan, 2).double()}
    for name, other in others.items():
        for power in (1, 2):
            found = torch.corrcoef(torch.stack([z**power, other**power]))[0, 1].item()
            assert abs(found) < 4 / count**0.5, name


def test_moments_and_buffers_start_at_zero():
    source = InitialWeights({"a": ParameterPlan(0.5, 0.0, None)}, seed=1)
    assert source.adam_step == 0
    assert source.read(SliceRange.whole("a", (3,))).tolist() == [0.5] * 3
    assert source.read(SliceRange.whole("a", (3,), "exp_avg")) is None
    assert source.read(SliceRange.whole("a.load", (3,))) is None


def test_no_number_is_drawn_for_others(monkeypatch):
    """The generator gives as many numbers as a range has; the rest of a block of eight is all that is thrown away."""
    asked = []

    class Counted(UniformBits):
        def read(self, start, count):
            asked.append(count)
            return super().read(start, count)

    monkeypatch.setattr(parameter_plan, "UniformBits", Counted)
    held = SliceRange.slice("a", (512, 4096), 1, rank=3, size=8).part(1000, 200_001)
    draw_range(held, ParameterPlan(0.0, 1.0, 1), seed=1)
    assert sum(asked) == held.count
    asked.clear()
    draw_range(held, ParameterPlan(1.0, 0.0, 1), seed=1)
    assert asked == []


def test_a_rank_of_gpt3_draws_its_part_of_the_numbers():
    """GPT-3 175B on tensor 8 x pipeline 16: each of the 128 ranks draws 1/128 of the numbers, within 10 %.

    Nothing is allocated: the layers are built on the device `meta`, cut into stages as the engine cuts them, and the
    ranges of each rank are counted where a plan draws at all. That a range costs `count` numbers is the test above.
    """
    config = load_config("configs/gpt/gpt3-175b.yaml", ["data.train=none"])
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    assert (tensor, pipeline) == (8, 16)
    with single_rank() as groups, torch.device("meta"):
        specs = layer_list(config.model, TensorParallel(groups, torch.device("meta")))
        bounds = cut([spec.cost for spec in specs], pipeline, [spec.with_next for spec in specs])
        stages = [Stage(specs, span) for span in zip(bounds, bounds[1:], strict=False)]
        whole = drawn_by_rank(Stage(specs, (0, len(specs))), rank=0, size=1)
        ranks = [drawn_by_rank(stage, rank, tensor) for stage in stages for rank in range(tensor)]
        tied = drawn_by_rank(stages[-1], 0, tensor, of=stages[-1].borrowed()) * tensor
        copies = drawn_by_rank(stages[0], 0, tensor, of={"positions.weight"}) * (tensor - 1)
    assert whole == pytest.approx(175e9, rel=0.01)
    assert sum(ranks) == whole + tied + copies, "each tensor rank holds all positions, two stages the tokens"
    assert 0.9 * whole / 128 < min(ranks) <= max(ranks) < 1.1 * whole / 128


def drawn_by_rank(stage: Stage, rank: int, size: int, of: set[str] | None = None) -> int:
    """How many numbers a tensor rank draws for its slices of a stage that was built for one."""
    plans = {name: parameter.plan for name, parameter in stage.named_global_parameters()}
    return sum(SliceRange.slice(name, tuple(held.shape), dim, rank=rank, size=size).count
               for name, held, dim in stage.named_global_tensors()
               if plans[name].std != 0.0 and (of is None or name in of))


def test_vector_instructions_change_nothing():
    """The same bits where NumPy is kept from every instruction set above its baseline."""
    code = ("import hashlib; from parallel.normal_numbers import UniformBits, inverse_normal\n"
            "print(hashlib.sha256(inverse_normal(UniformBits(5).read(3, 300_001)).tobytes()).hexdigest())")
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    hashes = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                             env={**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(disabled)}).stdout
              for disabled in ([], found)}
    assert len(hashes) == 1
