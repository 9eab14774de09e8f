"""What a forward pass keeps for backward: counted where autograd is handed it, for any model."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_efficient._compat import around_functorch, base_of_view, is_fake, storage_address


class Kept(NamedTuple):
    """A storage that waits for backward.

    Attributes:
        module: name of the innermost module that ran when it was kept; empty where none did.
        shape: of the first tensor that lives in it.
        dtype: likewise.
        nbytes: of the storage.
    """

    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


_ENTERED: list["SavedBytes"] = []
"""The records that count now, outermost first."""


class SavedBytes:
    """Counts bytes handed to autograd while it is entered; see :func:`saved_bytes`.

    Args:
        module: whose names count, and whose parameters and buffers do not.
        names: other names of its modules; those without one count as what they are in.

    Attributes:
        tensors: what was kept, one entry for each storage, in order.
        result: what the function returned, if one was given.
        interrupted: whether a transform of ``torch.func`` ran, which allows nobody to look: what it kept is not here.
    """

    def __init__(self, module: nn.Module | None = None, *, names: Mapping[str, nn.Module] | None = None) -> None:
        self.tensors: list[Kept] = []
        self.result: Any = None
        self.interrupted = False
        if names is None:
            names = {} if module is None else dict(module.named_modules())
        self._names = {id(each): name for name, each in names.items()}
        state = [] if module is None else [*module.parameters(), *module.buffers()]
        self._model = {_storage(each) for each in state}
        self._seen: set[int] = set()
        self._alive: list[Tensor] = []
        self._running: list[str] = []
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._functorch = around_functorch(self._step_aside, self._hooks.__enter__)
        self._handles: list[RemovableHandle] = []

    @property
    def total(self) -> int:
        """All bytes kept."""
        return sum(each.nbytes for each in self.tensors)

    def by_module(self) -> dict[str, int]:
        """Return the bytes by the module that kept them, largest first."""
        sums: dict[str, int] = defaultdict(int)
        for each in self.tensors:
            sums[each.module] += each.nbytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        lines = [f"{self.total / 2**20:10.2f} MiB kept for backward"]
        lines += [
            f"{size / 2**20:10.2f} MiB  {name or '(outside of modules)'}" for name, size in self.by_module().items()
        ]
        return "\n".join(lines)

    def __enter__(self) -> Self:
        self._handles = [
            register_module_forward_pre_hook(
                lambda module, args: self._running.append(self._names.get(id(module), ""))
            ),
            register_module_forward_hook(lambda module, args, y: self._leave(), always_call=True),
        ]
        _ENTERED.append(self)
        self._hooks.__enter__()
        self._functorch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._functorch.__exit__(kind, error, trace)
        self._hooks.__exit__(kind, error, trace)
        _ENTERED.remove(self)
        for handle in self._handles:
            handle.remove()
        self._alive, self._running = [], []

    def _step_aside(self) -> None:
        self.interrupted = True
        self._hooks.__exit__()

    def _leave(self) -> None:
        if self._running:
            self._running.pop()

    def _pack(self, tensor: Tensor) -> Tensor:
        for each in _ENTERED:  # autograd asks the innermost hooks alone
            each._count(tensor)
        # Not the tensor itself: one that is its operation's own result would hold the graph that holds it.
        return tensor.detach()

    def _count(self, tensor: Tensor) -> None:
        base = base_of_view(tensor)
        parameter = isinstance(tensor, nn.Parameter) or isinstance(base, nn.Parameter)
        key = _storage(tensor)
        if not parameter and key not in self._model and key not in self._seen:
            self._seen.add(key)
            self._alive.append(tensor.detach())  # else its address could be given to the next one
            name = next((name for name in reversed(self._running) if name), "")
            self.tensors.append(Kept(name, tuple(tensor.shape), tensor.dtype, tensor.untyped_storage().nbytes()))


def saved_bytes(fn: Callable[[], Any] | None = None, *, module: nn.Module | None = None) -> SavedBytes:
    """Count the bytes that autograd keeps for backward, each storage once, without parameters and buffers.

    Put the forward pass inside, and backward outside: what was counted stays allocated until the end of the block.
    Attributes that an ``autograd.Function`` sets on its context are not seen (bitsandbytes' int8 layers do so); compare
    with the allocator's peak where that matters. Nor is what happens within ``torch.func``'s transforms.

    Args:
        fn: run at once, and counted; its result is in ``result``. Without it, use the return value in ``with``.
        module: gives names, and the parameters and buffers to leave out. Without it, tensors that are parameters, or
            views of one, are left out.

    Returns:
        The record: ``total``, ``tensors``, ``by_module()``, and a table when printed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> with saved_bytes(module=model) as kept:
        ...     loss = model(torch.randn(2, 4)).sum()
        >>> kept.total
        64
    """
    record = SavedBytes(module)
    if fn is not None:
        with record:
            record.result = fn()
    return record


def _storage(tensor: Tensor) -> int:
    """The address of the memory, or of the storage where there is no memory: meta tensors and some subclasses."""
    if is_fake(tensor):
        return storage_address(tensor)
    try:
        return tensor.untyped_storage().data_ptr() or storage_address(tensor)
    except (RuntimeError, NotImplementedError):
        return storage_address(tensor)
