"""Which parameters have Kronecker vectors, and why the others have none."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import Tensor, nn

from lightning_efficient.eva.matrices import has_matrix_view
from lightning_efficient.eva.vectors import SUPPORTED, groups_of


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight with its bias, read as ``groups`` matrices of (outputs / groups) rows and ``fan_in`` columns.

    Attributes:
        name: the module's name, or the parameter's where there is no module.
        weight: (O, ...).
        bias: (O,), or None where there is none to train here.
        module: the layer that owns them; None for a bare tensor (Eva-s).
        groups: K.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None = None
    module: nn.Module | None = None
    groups: int = 1

    @property
    def outputs(self) -> int:
        """Rows over all groups, O."""
        return self.weight.shape[0]

    @property
    def fan_in(self) -> int:
        """Columns of each group's matrix, D."""
        return prod(self.weight.shape[1:])


@dataclass(frozen=True)
class FoundLayers:
    """What :func:`~lightning_efficient.eva.find_layers` has found.

    Attributes:
        layers: in the module's order.
        reasons: why a parameter is in none, by its name.
        names: of all parameters, by id.
        skipped: ids of the parameters of modules that were to be skipped.
    """

    layers: list[Layer]
    reasons: dict[str, str]
    names: dict[int, str]
    skipped: set[int]


def find_layers(module: nn.Module, parameters: Iterable[Tensor], skip: Sequence[str] = ()) -> FoundLayers:
    """Find the layers whose weight is among ``parameters``.

    Args:
        module: where to look, compiled or not.
        parameters: those that may be preconditioned.
        skip: shell patterns of module names to leave out.

    Returns:
        The layers in the module's order. A weight with two uses (tied to an embedding, shared by two modules) is in
        none: its gradient is a sum over uses, its vectors are not.

    Raises:
        ValueError: a pattern of ``skip`` matches no module.
    """
    wanted = {id(p) for p in parameters}
    modules = [(_plain(name), each) for name, each in module.named_modules()]
    _check_patterns(skip, [name for name, _ in modules])
    unused = {id(each.out_proj) for _, each in modules if isinstance(each, nn.MultiheadAttention)}

    owners: dict[int, list[tuple[str, str, nn.Module]]] = defaultdict(list)
    for name, each in modules:
        for kind, p in each.named_parameters(recurse=False):
            owners[id(p)].append((name, kind, each))

    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    names: dict[int, str] = {}
    skipped = {key for key, uses in owners.items() if any(_matches(name, skip) for name, _, _ in uses)} & wanted
    for key, uses in owners.items():
        name, kind, owner = uses[0]
        names[key] = _join(name, kind)
        if key not in wanted or (kind == "bias" and isinstance(owner, SUPPORTED) and len(uses) == 1):
            continue
        if len(uses) > 1:
            reasons[names[key]] = "shared by " + " and ".join(_join(other, which) for other, which, _ in uses)
        elif kind != "weight" or not isinstance(owner, SUPPORTED):
            reasons[names[key]] = f"{kind} of {type(owner).__name__}, which has no Kronecker vectors"
        elif id(owner) in unused:
            reasons[names[key]] = "torch.nn.MultiheadAttention never calls it"
        elif key in skipped:
            reasons[names[key]] = f"skip has {_matches(name, skip)!r}"
        else:
            assert isinstance(owner.weight, nn.Parameter)
            if not has_matrix_view(owner.weight):
                reasons[names[key]] = "its memory is neither contiguous nor channels-last"
                continue
            bias = owner.bias if owner.bias is not None and id(owner.bias) in wanted else None
            bias = bias if isinstance(bias, nn.Parameter) and len(owners[id(bias)]) == 1 else None
            layers.append(Layer(name, owner.weight, bias, owner, groups_of(owner)))
    with_vectors = {id(layer.bias) for layer in layers}
    for key, uses in owners.items():
        name, kind, owner = uses[0]
        if key in wanted and kind == "bias" and isinstance(owner, SUPPORTED) and key not in with_vectors:
            reasons.setdefault(names[key], "its weight is preconditioned by nobody")
    return FoundLayers(layers, reasons, names, skipped)


def _matches(name: str, patterns: Sequence[str]) -> str | None:
    """The first pattern that the name fits."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def _plain(name: str) -> str:
    """The name without what torch.compile puts in between."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _join(name: str, kind: str) -> str:
    return f"{name}.{kind}" if name else kind


def _check_patterns(skip: Sequence[str], names: Sequence[str]) -> None:
    for pattern in skip:
        if not any(_matches(name, [pattern]) for name in names):
            some = ", ".join(name for name in names if name)[:60] or "none"
            raise ValueError(
                f"skip has {pattern!r}: no module has such a name, so it would skip nothing. The names here are {some} "
                "...; correct the pattern or remove it."
            )
