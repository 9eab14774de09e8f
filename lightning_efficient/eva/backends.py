"""Where the backend of a step is chosen: the one place."""

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lightning_efficient.eva.config import Backend
from lightning_efficient.eva.step import EagerPasses, rank_one_step

StepFunction = Callable[..., Any]


def make_step(backend: Backend, device: torch.device) -> StepFunction:
    """Return :func:`~lightning_efficient.eva.step.rank_one_step` with its passes chosen.

    On the CPU the torch functions run in place of the Triton kernels, with a warning, unless Triton interprets
    (``TRITON_INTERPRET=1``).

    Raises:
        ModuleNotFoundError: ``"triton"``, but Triton is not installed.
    """
    if backend == "compiled":
        from lightning_efficient.eva.compiled import FusablePasses, compile_alone

        return partial(compile_alone(rank_one_step), FusablePasses())
    if backend == "triton":
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            warnings.warn(
                "backend='triton' on the CPU, for which Triton makes no code: torch's operations run instead. Set "
                "backend='compiled' for a fused step here.",
                stacklevel=2,
            )
            return partial(rank_one_step, EagerPasses())
        try:
            from lightning_efficient.eva.triton_passes import TritonPasses
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "backend='triton' needs the package triton, which is not installed: pip install triton (Linux), or set "
                "backend='compiled'."
            ) from error
        return partial(rank_one_step, TritonPasses())
    return partial(rank_one_step, EagerPasses())
