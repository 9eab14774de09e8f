"""Every touch of a private name of lightning or torch, one function each.

Nothing else in the package may reach for a private name. Each function has a test that fails with a readable message
when the name is gone.
"""

import copy
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import lightning.pytorch as pl
    from lightning.pytorch.strategies import ModelParallelStrategy
    from lightning.pytorch.utilities import CombinedLoader
    from torch import Tensor, nn
    from torch._C._distributed_c10d import GradBucket as GradBucket
    from torch.amp.grad_scaler import GradScaler
    from torch.nn.parallel import DistributedDataParallel

else:
    from torch.distributed import GradBucket as GradBucket  # absent from the stubs of torch.distributed

# The ways to run without memory, and to see every operator that runs; documented as such, in files of private names.
from torch._subclasses import FakeTensorMode as FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode


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


def storage_address(tensor: "Tensor") -> int:
    """The address of the object that holds the tensor's memory, which there is without any memory, too."""
    return int(tensor.untyped_storage()._cdata)


def graph_task_id() -> int:
    """The number of the backward pass that this thread runs, -1 outside of one."""
    import torch

    return torch._C._current_graph_task_id()


def tensor_version(tensor: "Tensor") -> int:
    """How often the tensor has been changed in place."""
    return tensor._version


def without_compile(module: "nn.Module") -> "nn.Module":
    """The module that `torch.compile` wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def compiles(module: "nn.Module") -> bool:
    """Whether something in the module runs compiled, by `torch.compile(module)` or `module.compile()`."""
    return any(
        hasattr(each, "_orig_mod")
        or getattr(each, "_compiled_call_impl", None) is not None
        or getattr(each, "_compiler_ctx", None) is not None
        for each in module.modules()
    )


def wrap_compiled_call(
    module: "nn.Module", around: "Callable[[], AbstractContextManager[Any]]"
) -> "Callable[[], None] | None":
    """Enter a context around every call of a module that `module.compile()` compiled in place.

    Its hooks run within the compiled graph, so they can neither time it nor be added without compiling it anew.

    Returns:
        What undoes it; None where the module is not compiled in place.
    """
    call = module._compiled_call_impl
    if call is None:
        return None

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with around():
            return call(*args, **kwargs)

    def undo() -> None:
        module._compiled_call_impl = call

    module._compiled_call_impl = wrapped
    return undo


def training_batches(trainer: "pl.Trainer") -> "CombinedLoader":
    """The training batches once more, from the start, apart from those that the fit loop has begun to read.

    `Trainer.train_dataloader` does not say how several loaders are combined, and a loader with persistent workers has
    one iterator for all who ask.
    """
    from lightning.pytorch.utilities import CombinedLoader

    used = trainer.fit_loop._combined_loader
    assert used is not None, "the training data is not set up"
    fresh = CombinedLoader(used.iterables, used._mode)
    fresh.flattened = [copy.copy(loader) for loader in used.flattened]
    fresh.limits = used.limits
    for loader in fresh.flattened:
        if hasattr(loader, "_iterator"):
            loader._iterator = None
    return fresh


def before_batch_transfer(module: "pl.LightningModule", batch: Any) -> Any:
    """Run the hook `on_before_batch_transfer` of the data module, or else of the module, as the fit loop does."""
    return module._on_before_batch_transfer(batch, dataloader_idx=0)


def starts_processes_by_fork_or_spawn(trainer: "pl.Trainer") -> bool:
    """Whether this process is a copy whose module is thrown away: `ddp_spawn`, `ddp_fork`, `ddp_notebook`."""
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def around_functorch(leave: "Callable[[], None]", enter: "Callable[[], None]") -> "AbstractContextManager[None]":
    """For as long as it is entered, have something done before and after each outermost transform of `torch.func`.

    Those transforms raise where hooks for saved tensors are set, which whoever set them can prevent in no other way.
    """
    from contextlib import contextmanager

    import torch

    graph: Any = torch.autograd.graph
    original, depth = graph.disable_saved_tensors_hooks, 0

    @contextmanager
    def aside(message: str) -> "Iterator[None]":
        nonlocal depth
        if not depth:
            leave()
        depth += 1
        try:
            with original(message):
                yield
        finally:
            depth -= 1
            if not depth:
                enter()

    @contextmanager
    def replaced() -> "Iterator[None]":
        graph.disable_saved_tensors_hooks = aside
        try:
            yield
        finally:
            graph.disable_saved_tensors_hooks = original

    return replaced()


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


def profiler_range(name: str) -> Any:
    """A context manager that names a range in the profiler's record, a tenth the cost of `record_function`."""
    from torch._C._profiler import _RecordFunctionFast

    return _RecordFunctionFast(name)


def profiler_records(profile: Any) -> list[Any]:
    """The raw records of a finished `torch.profiler.profile`; its own `events()` takes seconds to build a tree."""
    return list(profile.profiler.kineto_results.events())


def next_sequence_number() -> int:
    """The number that autograd will give to the next node of its graph that this thread makes."""
    import torch

    return torch._C._autograd._get_sequence_nr()


def running_sequence_number() -> int | None:
    """The number of the autograd node that runs backward in this thread now, None where none does."""
    import torch

    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


def plain_parts(tensor: "Tensor") -> "list[Tensor]":
    """The tensors that a tensor subclass wraps (a DTensor's part on this rank, a quantised one's codes and scales).

    The tensor itself where it wraps none.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    import torch

    names, _ = tensor.__tensor_flatten__()
    inner = [getattr(tensor, name) for name in names]  # a DTensor names its mesh, too
    return [part for each in inner if isinstance(each, torch.Tensor) for part in plain_parts(each)]


def set_data_parallel_size(strategy: "ModelParallelStrategy", size: int) -> None:
    """Decide how many ranks a strategy spreads the data over, once they can be counted."""
    strategy._data_parallel_size = size


def revive_gradient_hooks(parameter: "Tensor") -> None:
    """Make hooks on a parameter's accumulated gradient fire, those that are there and those to come.

    ``Module.to()`` swaps the inside of a DTensor. What called its hooks stays behind, and new ones are never called.
    """
    hooks = parameter._post_accumulate_grad_hooks
    parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
    parameter._post_accumulate_grad_hooks = hooks


def is_fake(tensor: "Tensor") -> bool:
    """Whether the tensor is one of `FakeTensorMode`: on a device, and without memory."""
    from torch._subclasses import FakeTensor

    return isinstance(tensor, FakeTensor)


def fake_tensor_errors() -> "tuple[type[Exception], ...]":
    """What a step raises under `FakeTensorMode` when it looks at the value of a tensor that has none."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    return DataDependentOutputException, DynamicOutputShapeException


def is_composed_operator(func: Any) -> bool:
    """Whether a dispatch mode was handed an operator that torch can take apart."""
    import torch

    return isinstance(func, torch._ops.OpOverload) and func.namespace != "prim"
