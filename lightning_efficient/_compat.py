"""Every touch of a private name of lightning or torch, one function each.

Nothing else in the package may reach for a private name. Each function has a test that fails with a readable message
when the name is gone.
"""

import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import GradBucket as GradBucket
    from torch.amp.grad_scaler import GradScaler
    from torch.nn.parallel import DistributedDataParallel

else:
    from torch.distributed import GradBucket as GradBucket  # absent from the stubs of torch.distributed


def require_lightning() -> None:
    """Check that the process uses `lightning`, not the separate package `pytorch_lightning`.

    The two packages hold different classes of the same names and separate registries: a `pytorch_lightning.Trainer`
    would call our strategy's name invalid.

    Raises:
        ImportError: `lightning` is not installed, or only `pytorch_lightning` has been imported.
    """
    if importlib.util.find_spec("lightning") is None:
        raise ImportError(
            "lightning_efficient needs the package 'lightning', which is not installed: pip install lightning."
        )
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        raise ImportError(
            "This program uses 'pytorch_lightning', and lightning_efficient plugs into 'lightning': they are separate "
            "packages whose Trainers do not know each other's parts. Replace 'import pytorch_lightning as pl' by "
            "'import lightning.pytorch as pl' before lightning_efficient is imported."
        )


def has_comm_hook(ddp_model: "DistributedDataParallel") -> bool:
    """Whether a communication hook is registered (torch keeps no public record)."""
    return bool(ddp_model._comm_hooks)


def loss_scale(scaler: "GradScaler") -> "Tensor | None":
    """The scale in force as a tensor on the scaler's device; `get_scale()` would wait for the device."""
    return scaler._scale if scaler.is_enabled() else None
