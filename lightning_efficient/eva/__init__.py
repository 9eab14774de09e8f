"""Kronecker-vectorised preconditioning (Eva, Eva-f, Eva-s): mathematics, capture and kernels, in plain PyTorch.

The optimizer that puts them together is :class:`lightning_efficient.optimizers.Eva`.
"""

from lightning_efficient.eva.capture import KVCapture
from lightning_efficient.eva.layers import Layer, find_layers
from lightning_efficient.eva.layout import Layout
from lightning_efficient.eva.precondition import Curvature, StepSize, curvature, precondition, step_size
from lightning_efficient.eva.report import LayerReport

__all__ = [
    "Curvature",
    "KVCapture",
    "Layer",
    "LayerReport",
    "Layout",
    "StepSize",
    "curvature",
    "find_layers",
    "precondition",
    "step_size",
]
