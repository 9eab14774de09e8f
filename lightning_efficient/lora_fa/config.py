"""What a LoRA-FA adapter is made of, and every value that is refused."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch

from lightning_efficient.lora_fa.functional import DropoutMode

Init = Literal["orthogonal", "eva", "gradient", "kaiming", "gaussian", "pissa"]
Backend = Literal["auto", "native", "peft"]
Lean = Literal["auto", "off"]

ADAPTER_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class LoRAFAConfig:
    r"""The adapters of :func:`~lightning_efficient.lora_fa.apply_lora_fa`: :math:`y = W x + s\,B A\,D(x)`, A frozen.

    Args:
        target_modules: which linears get an adapter: ``"all-linear"`` (all but the output head), a regular expression
            that a whole name has to match, or a list of names or their last parts. Only the adapters of the MLP free
            much memory: those of q and v alone free almost nothing.
        exclude_modules: regular expression or list of names to leave out.
        r: rank R. A row costs memory only in h (T, R): take twice what you would for LoRA.
        alpha: the scale s is ``alpha / r``.
        init: how A is drawn. ``"orthogonal"``: random orthonormal rows; ``"eva"``: leading directions of the layer's
            inputs, ``"gradient"``: of its weight's first gradient (both need batches); ``"pissa"``: of the weight;
            ``"kaiming"`` and ``"gaussian"`` as in PEFT, whose rows are not orthonormal.
        dropout: probability, on the input of the adapters.
        dropout_mode: ``"recompute"``: the mask follows from a seed; ``"lowrank"``: dropout on h instead;
            ``"saved"``: torch's dropout, whose mask is kept.
        adapter_dtype: of A and B, whatever the module is cast to: ``"float32"``, ``"bfloat16"``, ``"float16"`` or
            ``"float64"``.
        lean: replace the forward of adapted linears by the function that keeps only h.
        lean_mlp: ``"auto"``: gated feed-forward blocks whose three linears are adapted become one function.
        lean_norm: ``"auto"``: RMSNorms with frozen gains keep their input in its own dtype; activations next to
            adapted linears keep one tensor.
        modules_to_save: names (or last parts) of modules that are trained and saved whole, such as a new head.
        use_rslora: the scale is ``alpha / sqrt(r)``.
        rank_pattern: other ranks, by a regular expression that the end of a name has to match.
        alpha_pattern: other alphas, likewise.
        seed: with a layer's name, decides its A: equal on all ranks, clients and machines.
        backend: ``"native"``: our own layers; ``"peft"``: PEFT's layers with our forward (extra ``peft``);
            ``"auto"``: PEFT's where the model has PEFT's LoRA layers already, else our own.

    Raises:
        ValueError: a value is out of range.
    """

    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    r: int = 32
    alpha: float = 64.0
    init: Init = "orthogonal"
    dropout: float = 0.0
    dropout_mode: DropoutMode = "recompute"
    adapter_dtype: str = "float32"
    lean: bool = True
    lean_mlp: Lean = "auto"
    lean_norm: Lean = "auto"
    modules_to_save: list[str] = field(default_factory=list)
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        for where, rank in {"r": self.r, **self.rank_pattern}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"the rank ({where}) is {rank!r}: an adapter needs at least 1. Set a whole number.")
        for where, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not (_is_number(alpha) and math.isfinite(alpha) and alpha > 0):
                raise ValueError(f"the scale ({where}) is {alpha!r}: it multiplies the update. Set it above 0.")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout is {self.dropout!r}: it is a probability. Set it in [0, 1); 0 is none.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed is {self.seed!r}: every A follows from it. Set a whole number.")
        for name in ("lean", "use_rslora"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it is a switch. Set true or false.")
        _check_choice("init", self.init, get_args(Init))
        _check_choice("dropout_mode", self.dropout_mode, get_args(DropoutMode))
        _check_choice("adapter_dtype", self.adapter_dtype, ADAPTER_DTYPES)
        _check_choice("lean_mlp", self.lean_mlp, get_args(Lean))
        _check_choice("lean_norm", self.lean_norm, get_args(Lean))
        _check_choice("backend", self.backend, get_args(Backend))
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save is the string {self.modules_to_save!r}: write a list.")
        if not self.target_modules:
            raise ValueError("target_modules is empty: nothing would be adapted. Use 'all-linear' or name modules.")
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        patterns += [each for each in (self.target_modules, self.exclude_modules) if isinstance(each, str)]
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression ({error}): correct it.") from error

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of A and B."""
        dtype: torch.dtype = getattr(torch, self.adapter_dtype)
        return dtype

    def rank_of(self, name: str) -> int:
        """Return R of the module called ``name``."""
        return int(_by_pattern(self.rank_pattern, name, self.r))

    def alpha_of(self, name: str) -> float:
        """Return alpha of the module called ``name``."""
        return float(_by_pattern(self.alpha_pattern, name, self.alpha))

    def scale_of(self, name: str) -> float:
        """Return s of the module called ``name``: alpha over R, or over its root."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, which a checkpoint can hold."""
        return asdict(self)


def matches(name: str, wanted: str | Sequence[str] | None) -> bool:
    """Whether a module's name is meant by a regular expression (all of it) or a list of names or their last parts."""
    if wanted is None:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in wanted)


def pattern_meets(pattern: str, name: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` means the module called ``name``, as in PEFT."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def exactly(names: Sequence[str]) -> str:
    """Return a regular expression that matches these names and no others."""
    return "|".join(map(re.escape, names))


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if pattern_meets(pattern, name):
            return value
    return default


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}: there is no such one. Use {', '.join(map(repr, known))}.")
