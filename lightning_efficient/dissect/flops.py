"""Floating-point operations of a training step, by module and phase, counted while it runs."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from typing_extensions import Self, override

from lightning_efficient._compat import (
    TorchDispatchMode,
    compiles,
    graph_task_id,
    is_composed_operator,
    next_sequence_number,
    running_sequence_number,
)
from lightning_efficient.dissect.flop_formulas import flops_of, has_formula
from lightning_efficient.dissect.ranges import ModuleRanges


@dataclass(frozen=True, slots=True)
class ModuleFlops:
    """Operations of a module itself, without those of the modules in it.

    Attributes:
        forward: computed once.
        recompute: of forward, computed again in backward: by checkpointing, or by fused attention for its scores.
        backward: of the gradients.
    """

    forward: int = 0
    recompute: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """All three."""
        return self.forward + self.recompute + self.backward


class FlopCount:
    """Counts the operations of everything that this thread and its backward passes compute while it is entered.

    Put whole steps inside: a backward pass whose forward was outside is counted, but for no module. It changes no
    result; parts that `torch.compile` compiled run uncompiled meanwhile, as their kernels cannot be looked into. What
    a checkpointed function that is no module computes again counts as backward. torch runs no flex attention in it.

    Args:
        module: the model, whose names :meth:`by_module` uses; inside of a compiled one, all is that one's.

    Attributes:
        uncounted: operators of other libraries that ran and have no formula, by name.

    Example:
        >>> layer = torch.nn.Linear(8, 4)
        >>> with FlopCount(layer) as count:
        ...     layer(torch.ones(2, 8)).sum().backward()
        >>> count.forward, count.backward  # 2 x 2 x 8 x 4 each; the input needs no gradient
        (128, 128)
    """

    def __init__(self, module: nn.Module) -> None:
        self.uncounted: set[str] = set()
        self._compiled = compiles(module)
        self._modules = ModuleRanges(module).modules
        self._counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        self._stack = ExitStack()
        self._forget()

    @property
    def forward(self) -> int:
        """Operations of forward."""
        return sum(each[0] for each in self._counts.values())

    @property
    def recompute(self) -> int:
        """Operations of forward that ran again in backward."""
        return sum(each[1] for each in self._counts.values())

    @property
    def backward(self) -> int:
        """Operations of backward, without recomputation."""
        return sum(each[2] for each in self._counts.values())

    @property
    def total(self) -> int:
        """Everything."""
        return self.forward + self.recompute + self.backward

    @property
    def model_flops(self) -> int:
        """What the mathematics needs: all but recomputation."""
        return self.forward + self.backward

    @property
    def hardware_flops(self) -> int:
        """What ran: :attr:`total`."""
        return self.total

    def by_module(self) -> dict[str, ModuleFlops]:
        """Return the operations by path, largest first; the empty path is the model's own, or of no module."""
        counts = {path: ModuleFlops(*each) for path, each in self._counts.items()}
        return dict(sorted(counts.items(), key=lambda item: -item[1].total))

    def __enter__(self) -> Self:
        self._forget()
        with ExitStack() as stack:
            if self._compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for path, module in self._modules.items():
                enter, leave = partial(self._enter, path), partial(self._leave, path)
                stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            stack.enter_context(_Mode(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._forget()

    def _forget(self) -> None:
        # Modules whose forward runs, outermost first, each with the backward pass that it runs in.
        self._running: list[tuple[str, int]] = []
        # Where, in autograd's numbering, which module begins to make nodes: in forward, and in forwards that run again.
        self._marks: tuple[list[tuple[int, str]], list[tuple[int, str]]] = ([], [])
        self._repeats = False
        self._nested: dict[int, bool] = {}

    def _enter(self, path: str, *call: Any) -> None:
        task = graph_task_id()
        self._running.append((path, task))
        self._mark(task)

    def _leave(self, path: str, *call: Any) -> None:
        # An early stop of recomputation may leave modules whose hooks torch does not call.
        if any(each == path for each, _ in self._running):
            while self._running.pop()[0] != path:
                pass
        self._mark(graph_task_id())

    def _path(self, task: int) -> str:
        return self._running[-1][0] if self._running and self._running[-1][1] == task else ""

    def _mark(self, task: int) -> None:
        repeats = task != -1
        if repeats:
            self._nested.setdefault(task, self._repeats)
        self._repeats = repeats
        self._marks[repeats].append((next_sequence_number(), self._path(task)))

    def _add(self, total: int, repeated: int) -> None:
        task = graph_task_id()
        running = bool(self._running) and self._running[-1][1] == task
        if task == -1 or running:
            counts = self._counts[self._path(task)]
            counts[task != -1] += total
        else:
            counts = self._counts[self._made_by(task)]
            counts[1] += repeated
            counts[2] += total - repeated

    def _made_by(self, task: int) -> str:
        """The module whose forward made the autograd node that runs."""
        # Reentrant checkpointing runs forward again in one backward pass, and a second pass over its graph within the
        # first. On CUDA both run in a thread that numbers nodes on its own, so each graph is looked up in its own list.
        nested = self._nested.setdefault(task, self._repeats)
        self._repeats = False
        marks, number = self._marks[nested], running_sequence_number()
        if number is None:
            return ""
        at = bisect_right(marks, number, key=lambda mark: mark[0]) - 1
        return marks[at][1] if at >= 0 else ""


class _Mode(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, count: FlopCount) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count = count

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(each, "__tensor_flatten__") for each in types):
            return NotImplemented  # a DTensor, say: the operators on the plain tensors in it are what runs
        options = kwargs or {}
        operator = getattr(func, "overloadpacket", func)
        if has_formula(operator):
            result = func(*args, **options)
            self._count._add(*flops_of(operator, args, options, result))
            return result
        if torch.is_inference_mode_enabled() and is_composed_operator(func):
            # Only there composed operators arrive whole. Elsewhere some with a kernel of their own would be taken
            # apart, too, and round differently: backward of SiLU is one.
            with self:
                result = func.decompose(*args, **options)
            if result is not NotImplemented:
                return result
        if getattr(func, "namespace", "") not in ("aten", "prim", "prims", "c10d", "profiler"):
            self._count.uncounted.add(str(operator))
        return func(*args, **options)
