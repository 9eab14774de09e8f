"""Peaks are the datasheets' dense figures, for exactly the device that was named."""

import pytest
import torch

from lightning_efficient.dissect import peak_flops


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.5),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989.5),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H100 NVL", torch.bfloat16, 835.5),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100 80GB PCIe", torch.float32, 19.5),
        ("NVIDIA A800-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A10", torch.float16, 125),
        ("NVIDIA A10G", torch.float16, 70),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40", torch.bfloat16, 181),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA RTX A6000", torch.bfloat16, 154.8),
        ("NVIDIA RTX 6000 Ada Generation", torch.bfloat16, 364.2),
        ("NVIDIA H20", torch.bfloat16, 148),
        ("Tesla V100-SXM2-32GB", torch.float16, 125),
        ("Tesla T4", torch.float16, 65),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("AMD Instinct MI300X", torch.bfloat16, 1307.4),
    ],
)
def test_dense_rates_of_the_datasheets(name: str, dtype: torch.dtype, tera: float) -> None:
    assert peak_flops(name, dtype) == pytest.approx(tera * 1e12, rel=1e-12)


@pytest.mark.parametrize(
    "name",
    ["", "cpu", "NVIDIA A1", "NVIDIA A100", "NVIDIA L40SX", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GH200 480GB"],
)
def test_a_device_that_is_not_in_the_table_has_none(name: str) -> None:
    assert peak_flops(name, torch.bfloat16) is None


def test_types_without_units_have_none() -> None:
    assert peak_flops("Tesla V100-SXM2-32GB", torch.bfloat16) is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float8_e4m3fn) is None
    assert peak_flops("NVIDIA H200", torch.int8) is None


def test_tf32_holds_for_float32_alone() -> None:
    assert peak_flops("NVIDIA H200", torch.float32) == 67e12
    assert peak_flops("NVIDIA H200", torch.float32, tf32=True) == 494.7e12
    assert peak_flops("NVIDIA H200", torch.float64, tf32=True) == 67e12
