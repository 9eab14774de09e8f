"""The settings of Eva that are the same for all parameters, checked."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_efficient.eva.capture import GScale
from lightning_efficient.eva.precondition import DampingMode, Rescale, Variant
from lightning_efficient.eva.step import Rule

Backend = Literal["eager", "compiled", "triton"]
Fallback = Literal["sgd", "adamw"]

PUBLISHED_RESCALE: dict[Variant, Rescale] = {"eva": "clip", "eva_f": "normalize", "eva_s": "graft"}
PUBLISHED_NEW_WEIGHT: dict[Variant, float | Literal["sum"]] = {"eva": 0.95, "eva_f": 0.95, "eva_s": "sum"}


@dataclass(frozen=True)
class EvaConfig:
    """What :class:`~lightning_efficient.optimizers.Eva` is told once; its docstring says what each means.

    Raises:
        ValueError: a value is out of range or unknown.
    """

    variant: Variant
    damping_mode: DampingMode
    kl_clip: float | None
    rescale: Rescale
    kv_new_weight: float | Literal["sum"]
    kv_samples: int | None
    kv_every: int
    g_scale: GScale
    fallback: Fallback
    backend: Backend

    def __post_init__(self) -> None:
        for name, choices in (
            ("variant", Variant),
            ("damping_mode", DampingMode),
            ("rescale", Rescale),
            ("g_scale", GScale),
            ("fallback", Fallback),
            ("backend", Backend),
        ):
            _check_choice(name, getattr(self, name), get_args(choices))
        if self.kl_clip is not None and not self.kl_clip > 0:
            raise ValueError(
                f"kl_clip is {self.kl_clip}: it bounds the squared step and must be above 0. Set None for no clip."
            )
        if self.kv_new_weight != "sum" and not 0 < float(self.kv_new_weight) <= 1:
            raise ValueError(
                f"kv_new_weight is {self.kv_new_weight}: it is the weight of the newest vectors in their average, in "
                "(0, 1]. 1 keeps no memory; 'sum' adds all up."
            )
        if self.kv_samples is not None and self.kv_samples < 1:
            raise ValueError(f"kv_samples is {self.kv_samples}: it counts samples. Set 1 or more, or None for all.")
        if self.kv_every < 1:
            raise ValueError(f"kv_every is {self.kv_every}: it counts steps between captures. Set 1 or more.")

    @property
    def needs_module(self) -> bool:
        """Whether vectors are captured from layers, and not computed from gradients."""
        return self.variant != "eva_s"

    @property
    def needs_outputs(self) -> bool:
        """Whether output gradients are captured."""
        return self.variant == "eva"

    @property
    def rule(self) -> Rule:
        """What a step needs to know."""
        divide = self.damping_mode == "absolute" and self.variant != "eva_s"
        return Rule(self.damping_mode, divide, self.rescale, self.kl_clip)


def check_group(group: dict[str, Any]) -> None:
    """Check what each parameter group may set for itself.

    Raises:
        ValueError: a value is out of range.
        TypeError: the learning rate is a tensor.
    """
    if not isinstance(group["lr"], (int, float)):
        raise TypeError(f"lr is a {type(group['lr']).__name__}: Eva takes a number. Pass float(lr).")
    if not group["lr"] >= 0:
        raise ValueError(f"lr is {group['lr']}: a step of negative length goes uphill. Set 0 or more.")
    if not group["damping"] > 0:
        raise ValueError(
            f"damping is {group['damping']}: the curvature has rank 1, so without damping it has no inverse. Set it "
            "above 0."
        )
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum is {group['momentum']}: it is the share that is kept, in [0, 1).")
    if group.get("nesterov") and not group["momentum"]:
        raise ValueError("nesterov=True with momentum 0: it looks ahead along the momentum. Set momentum above 0.")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay is {group['weight_decay']}: a negative one makes weights grow. Set 0 or more.")


def fallback_ratio(fallback_lr: float | None, lr: float) -> float:
    """Return the learning rate of the fallback rule over that of the layers, which a schedule keeps.

    Raises:
        ValueError: there is no such ratio.
    """
    if fallback_lr is None:
        return 1.0
    if not (lr > 0 and fallback_lr >= 0):
        raise ValueError(
            f"fallback_lr is {fallback_lr} with lr {lr}: its ratio to lr is kept under a schedule. Set lr above 0 and "
            "fallback_lr to 0 or more."
        )
    return fallback_lr / lr


def check_parameter(p: Tensor) -> None:
    """Refuse parameters that no rule here can update.

    Raises:
        TypeError: it is complex.
        NotImplementedError: it is sharded.
    """
    if p.is_complex():
        raise TypeError(
            f"A parameter of shape {tuple(p.shape)} is complex: Eva and its fallback rules are real. Give it an "
            "optimizer of its own."
        )
    if isinstance(p, DTensor) or type(p).__name__ == "FlatParameter":
        raise NotImplementedError(
            f"A parameter is a {type(p).__name__}, a shard of a weight (FSDP, tensor parallelism): Eva needs whole "
            "weights. Train with strategy='ddp', or with another optimizer."
        )


def check_shape(state: dict[str, Any], p: Tensor, name: str) -> None:
    """Refuse a parameter's state that belongs to another shape.

    Raises:
        ValueError: the momentum has another shape.
    """
    momentum = state.get("momentum_buffer")
    if momentum is not None and momentum.shape != p.shape:
        raise ValueError(
            f"The state of parameter {name} has momentum of shape {tuple(momentum.shape)}, but its weight has "
            f"{tuple(p.shape)}: the checkpoint is of another model. Load the one of this model."
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: there is no such {name}. Use one of {', '.join(choices)}.")
