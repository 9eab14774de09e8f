"""Dense peak rates of GPUs, from their makers' datasheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

_T = 1e12


@dataclass(frozen=True, slots=True)
class _Rates:
    """In 10^12 operations per second; None where the device has no such units, or no sure figure."""

    fp16: float | None
    bf16: float | None
    fp32: float
    tf32: float | None = None
    fp64: float | None = None
    fp8: float | None = None


_A100 = _Rates(fp16=312, bf16=312, tf32=156, fp32=19.5, fp64=19.5)
_HOPPER_SXM = _Rates(fp16=989.5, bf16=989.5, tf32=494.7, fp32=67, fp64=67, fp8=1979)
_HOPPER_NVL = _Rates(fp16=835.5, bf16=835.5, tf32=417.5, fp32=60, fp64=60, fp8=1670.5)

# The whole name has to fit, as torch.cuda.get_device_name says it: an L40S is no L4, and a slice of an A100 is no A100.
_BY_NAME: dict[str, _Rates] = {
    r"Tesla V100-SXM[23]-\d+GB": _Rates(fp16=125, bf16=None, fp32=15.7, fp64=7.8),
    r"Tesla V100-PCIE-\d+GB": _Rates(fp16=112, bf16=None, fp32=14, fp64=7),
    r"Tesla V100S-PCIE-32GB": _Rates(fp16=130, bf16=None, fp32=16.4, fp64=8.2),
    r"(NVIDIA |Tesla )T4": _Rates(fp16=65, bf16=None, fp32=8.1),
    r"NVIDIA A10": _Rates(fp16=125, bf16=125, tf32=62.5, fp32=31.2),
    r"NVIDIA A10G": _Rates(fp16=70, bf16=70, tf32=35, fp32=31.5),
    r"NVIDIA A30": _Rates(fp16=165, bf16=165, tf32=82, fp32=10.3, fp64=10.3),
    r"NVIDIA A40": _Rates(fp16=149.7, bf16=149.7, tf32=74.8, fp32=37.4),
    r"(NVIDIA )?A100-(SXM4|PCIE|PCIe)-\d+GB|NVIDIA A100 80GB PCIe": _A100,
    r"NVIDIA A800-(SXM4|PCIE|PCIe)-\d+GB|NVIDIA A800 80GB PCIe": _A100,
    r"NVIDIA L4": _Rates(fp16=121, bf16=121, tf32=60, fp32=30.3, fp8=242.5),
    r"NVIDIA L40": _Rates(fp16=181, bf16=181, tf32=90.5, fp32=90.5, fp8=362),
    r"NVIDIA L40S": _Rates(fp16=362, bf16=362, tf32=183, fp32=91.6, fp8=733),
    # GeForce cards: at the rate of sums in float32, which is what torch computes.
    r"(NVIDIA )?GeForce RTX 3090": _Rates(fp16=71, bf16=71, tf32=35.6, fp32=35.6),
    r"NVIDIA GeForce RTX 4090": _Rates(fp16=165.2, bf16=165.2, tf32=82.6, fp32=82.6, fp8=330.3),
    r"NVIDIA GeForce RTX 5090": _Rates(fp16=209.5, bf16=209.5, tf32=104.8, fp32=104.8, fp8=419),
    r"(NVIDIA )?RTX A6000": _Rates(fp16=154.8, bf16=154.8, tf32=77.4, fp32=38.7),
    r"NVIDIA RTX 6000 Ada Generation": _Rates(fp16=364.2, bf16=364.2, tf32=182.1, fp32=91.1, fp8=728.5),
    r"NVIDIA H100 (SXM5 )?\d+GB( HBM\d)?": _HOPPER_SXM,
    r"NVIDIA H100 PCIe": _Rates(fp16=756, bf16=756, tf32=378, fp32=51, fp64=51, fp8=1513),
    r"NVIDIA H100 NVL": _HOPPER_NVL,
    r"NVIDIA H200": _HOPPER_SXM,
    r"NVIDIA H200 NVL": _HOPPER_NVL,
    r"NVIDIA H20": _Rates(fp16=148, bf16=148, tf32=74, fp32=44, fp64=1, fp8=296),
    r"NVIDIA H800": _Rates(fp16=989.5, bf16=989.5, tf32=494.7, fp32=67, fp64=1, fp8=1979),
    r"NVIDIA H800 PCIe": _Rates(fp16=756, bf16=756, tf32=378, fp32=51, fp64=0.8, fp8=1513),
    r"NVIDIA B200": _Rates(fp16=2250, bf16=2250, tf32=1125, fp32=75, fp64=37, fp8=4500),
    r"NVIDIA GB200": _Rates(fp16=2500, bf16=2500, tf32=1250, fp32=80, fp64=40, fp8=5000),
    r"AMD Instinct MI210": _Rates(fp16=181, bf16=181, fp32=45.3, fp64=45.3),
    r"AMD Instinct MI250X": _Rates(fp16=191.5, bf16=191.5, fp32=47.9, fp64=47.9),  # torch sees each half as a device
    r"AMD Instinct MI300X": _Rates(fp16=1307.4, bf16=1307.4, fp32=163.4, fp64=163.4, fp8=2614.9),
}

_FIELD_OF: dict[torch.dtype, str] = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
    torch.float8_e4m3fnuz: "fp8",
    torch.float8_e5m2fnuz: "fp8",
}


def peak_flops(device_name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """Return the most that one device computes by its datasheet, in floating-point operations per second.

    Dense: datasheets print twice as much for matrices of which half the entries are zero in a fixed pattern. Of matrix
    units where there are some for the type, with sums in float32.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` says it.
        dtype: in which matrices are multiplied.
        tf32: whether float32 products may round their factors to TF32, which
            ``torch.set_float32_matmul_precision("high")`` allows.

    Returns:
        The rate; None for a device that is not in the table, and for a type that it has no units for.

    Example:
        >>> peak_flops("NVIDIA H200", torch.bfloat16)
        989500000000000.0
        >>> peak_flops("NVIDIA H200 MIG 1g.18gb", torch.bfloat16) is None
        True
    """
    rates = next((rates for name, rates in _BY_NAME.items() if re.fullmatch(name, device_name.strip())), None)
    field = "tf32" if tf32 and dtype == torch.float32 else _FIELD_OF.get(dtype)
    if rates is None or field is None:
        return None
    rate: float | None = getattr(rates, field)
    return None if rate is None else rate * _T
