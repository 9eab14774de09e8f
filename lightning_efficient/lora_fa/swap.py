"""Give a module another forward by giving it a subclass, so that it can still be copied, pickled and compiled."""

from functools import cache
from typing import Any

from torch import nn


def swap(module: nn.Module, mixin: type) -> None:
    """Make ``module`` an instance of ``mixin`` and its own class; ``isinstance`` and its state stay as they are."""
    if not isinstance(module, mixin):
        own: Any = type(module)
        module.__class__ = _combined(mixin, own)


def swap_back(module: nn.Module) -> None:
    """Undo :func:`swap`; a module that was not swapped stays as it is."""
    if isinstance(module, _Swapped):
        module.__class__ = module._swapped_from


class _Swapped:
    """Marks the classes that are made here."""

    _mixin: type
    _swapped_from: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class has no name that pickle could look up: it is made again from the two that have one.
        getstate = getattr(self, "__getstate__", None)  # every object has it from Python 3.11 on
        return _restore, (self._mixin, self._swapped_from), getstate() if getstate else self.__dict__


@cache
def _combined(mixin: Any, own: Any) -> type:
    fields = {"_mixin": mixin, "_swapped_from": own, "__module__": own.__module__, "__doc__": own.__doc__}
    return type(own.__name__, (_Swapped, mixin, own), fields)


def _restore(mixin: type, own: type) -> Any:
    kind: Any = _combined(mixin, own)
    return kind.__new__(kind)
