"""Gradient compression for data-parallel training: fewer bytes on a slow link, the same model at the end.

Plain PyTorch: nothing here imports Lightning.
"""

from lightning_efficient.compression.acp_sgd import ACPSGD
from lightning_efficient.compression.base import Compressor, Observation
from lightning_efficient.compression.ddp import register_compressor
from lightning_efficient.compression.half_precision import HalfPrecision
from lightning_efficient.compression.power_sgd import PowerSGD
from lightning_efficient.compression.replicas import check_replicas
from lightning_efficient.compression.sign_sgd import SignSGD
from lightning_efficient.compression.stats import CompressionStats
from lightning_efficient.compression.top_k import TopK

COMPRESSORS: dict[str, type[Compressor]] = {c.method: c for c in (ACPSGD, PowerSGD, TopK, SignSGD, HalfPrecision)}
"""Compressors by the name recipes use."""

__all__ = [
    "ACPSGD",
    "COMPRESSORS",
    "CompressionStats",
    "Compressor",
    "HalfPrecision",
    "Observation",
    "PowerSGD",
    "SignSGD",
    "TopK",
    "check_replicas",
    "register_compressor",
]
