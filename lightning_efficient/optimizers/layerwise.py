"""What the optimizers here share: they know the layers that own their parameters."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import Self, override

from lightning_efficient.eva.config import check_group, check_parameter, check_shape, fallback_ratio
from lightning_efficient.eva.layers import FoundLayers, find_layers
from lightning_efficient.eva.sources import wide_dtype


class LayerwiseOptimizer(Optimizer):
    """An optimizer that treats the weights of Linear and convolution layers in one way, and all else in another.

    A subclass says in :meth:`_watch` what it does with the layers of a module, and undoes it in :meth:`_unwatch`. A
    parameter group with ``fallback: True`` counts as "all else".
    """

    _module: nn.Module | None = None
    _skip: tuple[str, ...] = ()
    _names: dict[int, str]
    _reasons: dict[str, str]
    _wide_keys: tuple[str, ...] = ()
    """Entries of a state that stay in float32 or wider, whatever the type of the weight."""
    _settings: tuple[str, ...] = ()
    """Attributes that a copy keeps. It watches no module."""

    @abstractmethod
    def _watch(self, found: FoundLayers) -> None:
        """Prepare for these layers; may raise, and then leaves nothing behind."""

    @abstractmethod
    def _unwatch(self) -> None:
        """Undo :meth:`_watch`, also where it was never called."""

    @property
    def needs_module(self) -> bool:
        """Whether :meth:`attach` must be called before the first step."""
        return True

    @property
    def attached(self) -> bool:
        """Whether a module is attached."""
        return self._module is not None

    def attach(self, module: nn.Module, skip: Sequence[str] = ()) -> Self:
        """Watch the layers of ``module``; do it before the module runs compiled for the first time.

        Args:
            module: holds the parameters, compiled or wrapped or not.
            skip: shell patterns of names of modules to leave to the fallback rule, such as ``"*lm_head"``.

        Returns:
            The optimizer.

        Raises:
            ValueError: another module is attached, a pattern matches nothing, no weight of a supported layer is among
                the parameters, or a state loaded before belongs to another model.
            TypeError: ``skip`` is a string.
            NotImplementedError: the weights lie on several devices (Eva).
        """
        kind = type(self).__name__
        if self._module is not None and self._module is not module:
            raise ValueError(
                f"{kind} is attached to another module already: one optimizer watches one module. Call detach() first."
            )
        if isinstance(skip, str):
            raise TypeError(f"skip is the string {skip!r}: it is a list of patterns. Write [{skip!r}].")
        self.detach()
        owned = [p for group in self.param_groups if not group["fallback"] for p in group["params"]]
        found = find_layers(module, owned, skip)
        if self.needs_module and not found.layers:
            kinds = sorted({type(each).__name__ for each in module.modules() if list(each.parameters(recurse=False))})
            raise ValueError(
                f"None of the {len(owned)} parameters to precondition is the weight of a Linear or convolution in this "
                f"module, whose {len(list(module.parameters()))} parameters lie in {', '.join(kinds) or 'no layer'}. "
                "Attach the module whose parameters the optimizer holds."
            )
        group_of = self._group_of()
        found.layers.sort(key=lambda layer: group_of[id(layer.weight)])
        self._watch(found)
        self._module, self._skip = module, tuple(skip)
        self._names, self._reasons = found.names, {**self._reasons_of(found), **self._fallback_groups(found.names)}
        return self

    def detach(self) -> None:
        """Stop watching. The state stays, and :meth:`attach` goes on with it."""
        self._unwatch()
        self._module, self._skip, self._names, self._reasons = None, (), {}, {}

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its layers are watched too where a module is attached.

        Raises:
            ValueError: a setting is out of range.
            TypeError: a parameter is complex, or ``lr`` is a tensor.
            NotImplementedError: a parameter is sharded.
        """
        own = dict(param_group)
        if own.get("fallback") and "lr" in own:
            own.setdefault("fallback_ratio", 1.0)  # what it says is its learning rate
        if "fallback_lr" in own:
            own["fallback_ratio"] = fallback_ratio(own.pop("fallback_lr"), own.get("lr", self.defaults["lr"]))
        super().add_param_group(own)
        group = self.param_groups[-1]
        check_group(group)
        for p in group["params"]:
            check_parameter(p)
        module, skip = self._module, self._skip
        self.detach()
        if module is not None:
            self.attach(module, skip)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; vectors keep their type, whatever that of the weights.

        Raises:
            ValueError: the state belongs to other shapes.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        saved = state_dict["state"]
        if len(keys) == len(params):  # else torch's own error says more
            for key, p in zip(keys, params, strict=True):
                check_shape(saved.get(key, {}), p, self._names.get(id(p), f"number {key}"))
        super().load_state_dict(state_dict)
        for key, p in zip(keys, params, strict=True):
            for name in self._wide_keys:
                if name in saved.get(key, {}):
                    # torch has cast it to the type of the weight.
                    self.state[p][name] = saved[key][name].detach().to(p.device, wide_dtype([p]), copy=True)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._settings}}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        if not hasattr(self, "_names"):  # a copy
            self.detach()
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():  # a state of another optimizer may lack some
                group.setdefault(name, value)

    def _reasons_of(self, found: FoundLayers) -> dict[str, str]:
        return found.reasons

    def _fallback_groups(self, names: dict[int, str]) -> dict[str, str]:
        left_out = [p for group in self.param_groups if group["fallback"] for p in group["params"]]
        return {names[id(p)]: "its parameter group has fallback=True" for p in left_out if id(p) in names}

    def _group_of(self) -> dict[int, int]:
        return {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}

    def _check_dense(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse:
                    raise TypeError(
                        f"The gradient of {self._names.get(id(p), 'a parameter')} is sparse: {type(self).__name__} and "
                        "its fallback rule are dense. Make the embedding with sparse=False, or give it an optimizer of "
                        "its own."
                    )


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """Return the loss that ``closure`` computes with gradients, None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
