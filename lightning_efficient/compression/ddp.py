"""Gradient compression for plain ``torch.nn.parallel.DistributedDataParallel``."""

import time
import weakref
from typing import TypeVar

from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient import _compat
from lightning_efficient._compat import GradBucket
from lightning_efficient.compression.base import Compressor, LossScale

_COMPILED = "_orig_mod."
"""What torch.compile puts into the names of a module's parameters; state is kept under the names without it."""

_LAST_CALLBACK_S = 0.05
"""A DDP model that dies right after a backward pass may take the process group along, whose destructor joins gloo's
threads while it holds the interpreter lock; a thread that still wants that lock, to drop the last callback, then waits
for ever (torch's own Python hooks hang in the same way). Sleeping first lets it have the lock."""

CompressorT = TypeVar("CompressorT", bound=Compressor)


def register_compressor(
    ddp_model: DistributedDataParallel, compressor: CompressorT, *, loss_scale: LossScale | None = None
) -> CompressorT:
    """Compress the gradients of a DDP model. A collective: every rank calls it, before the first backward.

    Args:
        ddp_model: a model wrapped in DDP, without a communication hook.
        compressor: for example ``ACPSGD(rank=4)``; one compressor serves one model.
        loss_scale: with a ``torch.amp.GradScaler``, a function that returns the scale in force, such as
            ``scaler.get_scale``; returning a tensor on the device spares the GPU a wait.

    Returns:
        ``compressor``, whose ``stats`` tell what it did.

    Raises:
        ValueError: the model already has a communication hook, or an option that lets buckets bypass it.
        RuntimeError: the parameters differ across ranks.

    Example::

        model = DistributedDataParallel(model)
        compressor = register_compressor(model, ACPSGD(rank=4))
    """
    if _compat.has_comm_hook(ddp_model):
        raise ValueError(
            "the DDP model already has a communication hook: DDP takes one. Wrap the model anew, or leave out the "
            "other hook."
        )
    if getattr(ddp_model, "skip_all_reduce_unused_params", False):  # an option of recent torch
        raise ValueError(
            "the DDP model has skip_all_reduce_unused_params=True: buckets that bypass the hook leave the compressor "
            "waiting for them. Leave the option out; find_unused_parameters=True works."
        )
    named = [
        (name.replace(_COMPILED, ""), p)
        for name, p in ddp_model.module.named_parameters()
        if name not in ddp_model.parameters_to_ignore
    ]
    compressor.bind(
        named,
        ddp_model.process_group,
        loss_scale=loss_scale,
        detect_unused=ddp_model.find_unused_parameters or ddp_model.static_graph,
    )
    ddp_model.register_comm_hook(compressor, _comm_hook)
    weakref.finalize(ddp_model, time.sleep, _LAST_CALLBACK_S)
    return compressor


def _comm_hook(state: Compressor, bucket: GradBucket) -> Future[Tensor]:
    # A plain function with real annotations: DDP refuses callable objects, partials and string annotations.
    return state.reduce(bucket)
