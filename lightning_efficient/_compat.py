"""Every touch of a private name of lightning or torch, one function each.

Nothing else in the package may reach for a private name. Each function has a test that fails with a readable message
when the name is gone.
"""

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

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


def base_of_view(tensor: "Tensor") -> "Tensor | None":
    """The tensor that ``tensor`` is a view of, None if it is none."""
    return tensor._base


def graph_task_id() -> int:
    """The number of the backward pass that this thread runs, -1 outside of one."""
    import torch

    return torch._C._current_graph_task_id()


def tensor_version(tensor: "Tensor") -> int:
    """How often the tensor has been changed in place."""
    return tensor._version


def forget_init_args_of_another_class() -> None:
    """Make jsonargparse start from a class's own defaults whenever a recipe names another class than before.

    As it is, arguments of the class named before live on where the new class accepts them, even those nobody wrote: a
    recipe that asks for `SGD(lr, momentum)` from a model whose default is AdamW trains with AdamW's weight decay.
    Holds for this process; calling it again changes nothing.

    Raises:
        RuntimeError: jsonargparse no longer has the function.
    """
    from jsonargparse import Namespace, _typehints

    def discard(parser_or_action: object, prev_val: Any, value: Any) -> None:
        if prev_val and "init_args" in prev_val and not _same_class(prev_val["class_path"], value["class_path"]):
            prev_val["init_args"] = Namespace()  # type: ignore[no-untyped-call]

    if not hasattr(_typehints, "discard_init_args_on_class_path_change"):
        raise RuntimeError(
            "jsonargparse has no _typehints.discard_init_args_on_class_path_change any more: recipes would mix the "
            "arguments of two classes. Install jsonargparse 4.53, or adapt lightning_efficient._compat."
        )
    _typehints.discard_init_args_on_class_path_change = discard


def _same_class(path: str, other: str) -> bool:
    """Whether two class paths name one class; a short name, without its module, counts as any class of that name."""
    short = "." not in path or "." not in other
    return path == other or (short and path.rsplit(".", 1)[-1] == other.rsplit(".", 1)[-1])
