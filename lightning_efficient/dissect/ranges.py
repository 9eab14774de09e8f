"""Named ranges around every module's forward call, for as long as they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_efficient._compat import compiles, graph_task_id, profiler_range, wrap_compiled_call
from lightning_efficient.dissect.events import FORWARD, RECOMPUTE
from lightning_efficient.dissect.roles import role_of

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Runs again in backward without its wrapper, which is none of the model's modules therefore.
_REPEATED = "_checkpoint_wrapped_module"


class ModuleRanges:
    """Hooks that open ``le::F:path`` before a module's forward and close it after, also where it raises.

    A forward that runs inside of backward repeats one whose activations were not kept: its range is ``le::R:path``.
    Nothing is attached inside of a compiled module, where hooks would not fire or would cut the graph: it is one row,
    with a range around the call of what was compiled. A TorchScript module takes no hooks at all: its time is that of
    the module it is in.

    Args:
        module: whose submodules to watch.
        root: whether to watch the module itself, too.

    Attributes:
        modules: the watched modules by path, in the order of the model; a shared one has its first path.
        compiled: paths of the compiled ones.
        scripted: paths of TorchScript modules, which are not watched.
    """

    def __init__(self, module: nn.Module, *, root: bool = True) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.compiled: list[str] = []
        self.scripted: list[str] = []
        self._undo: list[Callable[[], None]] = []
        self._open: list[tuple[str, Any]] = []
        self._collect(module, "", root=root, seen=set())

    def attach(self) -> None:
        """Attach the hooks; those of an earlier call go first."""
        self.detach()
        for path, module in self.modules.items():
            # A module compiled in place runs its hooks within the graph.
            around = wrap_compiled_call(module, partial(self._range, path))
            if around is not None:
                self._undo.append(around)
                continue
            enter, leave = self._hooks(path)
            # First in and last out, so that other hooks count as the module's own time.
            self._undo.append(module.register_forward_pre_hook(enter, prepend=True).remove)
            self._undo.append(module.register_forward_hook(leave, always_call=True).remove)

    def detach(self) -> None:
        """Remove the hooks and close what is open."""
        while self._undo:
            self._undo.pop()()
        self._close_to(0)

    def describe(self) -> dict[str, tuple[str, str]]:
        """Return role and class by path."""
        return {path: (role_of(path, each), type(each).__name__) for path, each in self.modules.items()}

    def _hooks(self, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        return lambda *call: self._enter(path), lambda *call: self._leave(path)

    @contextmanager
    def _range(self, path: str) -> Iterator[None]:
        self._enter(path)
        try:
            yield
        finally:
            self._leave(path)

    def _enter(self, path: str) -> None:
        entered = profiler_range((RECOMPUTE if graph_task_id() != -1 else FORWARD) + path)
        entered.__enter__()
        self._open.append((path, entered))

    def _leave(self, path: str) -> None:
        # Above it may lie ranges of modules whose hooks torch did not call, after an interruption.
        for at in range(len(self._open) - 1, -1, -1):
            if self._open[at][0] == path:
                self._close_to(at)
                return

    def _close_to(self, depth: int) -> None:
        while len(self._open) > depth:
            self._open.pop()[1].__exit__(None, None, None)

    def _collect(self, module: nn.Module, path: str, *, root: bool, seen: set[int]) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, torch.jit.ScriptModule):
            self.scripted.append(path)
            return
        is_compiled = _is_compiled(module)
        if is_compiled:
            self.compiled.append(path)
        if root and not hasattr(module, _REPEATED):
            self.modules.setdefault(path, module)
        if is_compiled:
            return
        for name, child in module.named_children():
            inner = path if name in _WRAPPERS or _is_data_parallel(module) else f"{path}.{name}" if path else name
            self._collect(child, inner, root=inner != path or root, seen=seen)


def _is_compiled(module: nn.Module) -> bool:
    shallow = nn.Module()
    shallow.__dict__.update({k: v for k, v in module.__dict__.items() if k != "_modules"})
    return compiles(shallow) or hasattr(module, "_orig_mod")


def _is_data_parallel(module: nn.Module) -> bool:
    return type(module).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
