"""Named ranges around every module's forward call, for as long as they are wanted."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient._compat import compiles, graph_task_id, profiler_range
from lightning_efficient.dissect.events import FORWARD, RECOMPUTE
from lightning_efficient.dissect.roles import role_of

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class ModuleRanges:
    """Hooks that open ``le::F:path`` before a module's forward and close it after, also where it raises.

    A forward that runs inside of backward repeats one whose activations were not kept: its range is ``le::R:path``.
    Nothing is attached inside of a compiled module, where hooks would not fire or would cut the graph: it is one row.

    Args:
        module: whose submodules to watch.
        root: whether to watch the module itself, too.

    Attributes:
        modules: the watched modules by path, in the order of the model; a shared one has its first path.
        compiled: paths of the compiled ones.
    """

    def __init__(self, module: nn.Module, *, root: bool = True) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.compiled: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._open: list[Any] = []
        self._collect(module, "", root=root, seen=set())

    def attach(self) -> None:
        """Attach the hooks; those of an earlier call go first."""
        self.detach()
        for path, module in self.modules.items():
            names = (FORWARD + path, RECOMPUTE + path)
            # First in and last out, so that other hooks count as the module's own time.
            self._handles.append(module.register_forward_pre_hook(self._opener(names), prepend=True))
            self._handles.append(module.register_forward_hook(self._close, always_call=True))

    def detach(self) -> None:
        """Remove the hooks and close what is open."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        while self._open:
            self._open.pop().__exit__(None, None, None)

    def describe(self) -> dict[str, tuple[str, str]]:
        """Return role and class by path."""
        return {path: (role_of(path, each), type(each).__name__) for path, each in self.modules.items()}

    def _opener(self, names: tuple[str, str]) -> Any:
        def open_range(module: nn.Module, args: Any) -> None:
            entered = profiler_range(names[graph_task_id() != -1])
            entered.__enter__()
            self._open.append(entered)

        return open_range

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)

    def _collect(self, module: nn.Module, path: str, *, root: bool, seen: set[int]) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        is_compiled = _is_compiled(module)
        if root and is_compiled:
            self.compiled.append(path)
        if root and (not is_compiled or hasattr(module, "_orig_mod")):
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
