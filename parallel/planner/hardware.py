"""Peak arithmetic rates of accelerators (imports no torch).

Each rate is the vendor's dense figure; a data sheet that prints "with sparsity" is halved here. A device that is
not in the table, a share of a device (MIG) and a dtype the device has no units for all have no peak: `None`, never a
guess. fp32 is the plain fp32 rate, because torch leaves TF32 off unless it is asked for.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

TERA = 1e12


@dataclass(frozen=True)
class Device:
    """One accelerator model.

    pattern: regular expression the whole of `torch.cuda.get_device_name()` must match, vendor word removed.
    peak_flops: dtype name (`bf16`, `fp16`, `fp32`) -> floating point operations per second.
    """

    name: str
    pattern: str
    peak_flops: Mapping[str, float]


def _rates(*, half: float, fp32: float | None, has_bf16: bool = True) -> Mapping[str, float]:
    """Rates in TFLOP/s -> FLOP/s by dtype; fp16 and bf16 share their units on every device that has both."""
    rates = {"fp16": half * TERA}
    if has_bf16:
        rates["bf16"] = half * TERA
    if fp32 is not None:
        rates["fp32"] = fp32 * TERA
    return MappingProxyType(rates)


DEVICES = (
    # NVIDIA V100 data sheet (2020): tensor 112 / 125 / 130 TFLOPS, single precision 14 / 15.7 / 16.4. No bf16 units.
    Device("V100 PCIe", r"V100-PCIE-\d+GB", _rates(half=112, fp32=14.0, has_bf16=False)),
    Device("V100 SXM", r"V100-SXM[23]-\d+GB(-LS)?", _rates(half=125, fp32=15.7, has_bf16=False)),
    Device("V100S", r"V100S-PCIE-\d+GB", _rates(half=130, fp32=16.4, has_bf16=False)),
    # NVIDIA A100 data sheet (2021): BFLOAT16 and FP16 tensor core 312 TFLOPS dense, FP32 19.5, on SXM and PCIe alike.
    Device("A100", r"A100-SXM4-(40|80)GB|A100-PCIE-40GB|A100 80GB PCIe", _rates(half=312, fp32=19.5)),
    # NVIDIA H100 Tensor Core GPU Architecture white paper (2022), dense peaks: SXM5 989.4 and 66.9, PCIe 756 and 51.2.
    Device("H100 SXM", r"H100 80GB HBM3", _rates(half=989.4, fp32=66.9)),
    Device("H100 PCIe", r"H100 PCIe", _rates(half=756, fp32=51.2)),
    # NVIDIA H100 data sheet (2024): NVL 1,671 TFLOPS with sparsity, FP32 60.
    Device("H100 NVL", r"H100 NVL", _rates(half=1671 / 2, fp32=60)),
    # NVIDIA H200 data sheet (2024): SXM 1,979 TFLOPS with sparsity, FP32 67; NVL 1,671 with sparsity, FP32 60.
    Device("H200 SXM", r"H200", _rates(half=1979 / 2, fp32=67)),
    Device("H200 NVL", r"H200 NVL", _rates(half=1671 / 2, fp32=60)),
    # NVIDIA DGX B200 / HGX B200 data sheets (2024): 36 PFLOPS FP16/BF16 with sparsity for eight. Their FP32 figures
    # differ between editions, so none stands here.
    Device("B200", r"B200", _rates(half=36_000 / 8 / 2, fp32=None)),
)


def find_device(device_name: str) -> Device | None:
    """The table entry for a device name as torch reports it (`NVIDIA A100-SXM4-80GB`), or None."""
    bare = re.sub(r"^(NVIDIA|Tesla)\s+", "", device_name.strip())
    return next((device for device in DEVICES if re.fullmatch(device.pattern, bare)), None)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of one device in floating point operations per second, or None where it is not known.

    dtype: `bf16`, `fp16` or `fp32`.
    """
    device = find_device(device_name)
    return device.peak_flops.get(dtype) if device else None
