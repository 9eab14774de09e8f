"""The profiler's records as plain values, and the labels that the ranges of this package carry.

A label is the name of a range: ``le::step`` for an optimizer step, ``le::F:path`` and ``le::R:path`` for a module's
forward call and its recomputation, ``le::P:phase:row`` for anything else that is to be a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType  # type: ignore[attr-defined]  # absent from __all__

from lightning_efficient._compat import profiler_records

STEP = "le::step"
FORWARD = "le::F:"
RECOMPUTE = "le::R:"
PHASE = "le::P:"

_ITEMSIZE = {
    "double": 8, "long int": 8, "long": 8, "c10::complex<float>": 8, "float": 4, "int": 4,
    "c10::Half": 2, "c10::BFloat16": 2, "short": 2, "signed char": 1, "unsigned char": 1, "bool": 1,
}  # fmt: skip


_RESULT_FIRST = (
    "c10d::_allgather_base_",
    "c10d::_reduce_scatter_base_",
    "c10d::alltoall_base_",
    "c10d::reduce_scatter_",
)
"""Calls whose first tensor is what comes out."""


@dataclass(frozen=True, slots=True)
class Event:
    """One record of the profiler; times in nanoseconds.

    Attributes:
        name: of the operator, kernel or range.
        start: when it began.
        end: when it ended.
        thread: the thread it ran on, numbered by torch.
        forward_thread: for a backward node, the thread that built it; else 0.
        sequence: number of the autograd node that the operator was about to make, or that the node has; -1 for none.
        is_async: it began on one thread and ended on another, as a collective does.
        on_device: a kernel or copy of a GPU.
        is_range: named by the user or a library, such as ``Optimizer.step#SGD.step``; it computes nothing itself.
        correlation: links a kernel (here: the operator's number) to its operator (its own number); 0 for neither.
        n_bytes: of what is handed in, for collectives; else 0.
    """

    name: str
    start: int
    end: int
    thread: int = 1
    forward_thread: int = 0
    sequence: int = -1
    is_async: bool = False
    on_device: bool = False
    is_range: bool = False
    correlation: int = 0
    n_bytes: int = 0


def events_of(profile: Any) -> list[Event]:
    """Return the records of a finished ``torch.profiler.profile``.

    Args:
        profile: with ``record_shapes=True``, else collectives have no sizes.

    Returns:
        The events, in no particular order.
    """
    # A GPU's echo of a range is no work of its own.
    return [
        _event(record)
        for record in profiler_records(profile)
        if _is_on_host(record) or not (record.is_user_annotation() or record.name().startswith("le::"))
    ]


def is_collective_backend(name: str) -> bool:
    """Whether it is the work of a collective itself, as the backend does it, and not the call that asks for it."""
    return name.startswith("gloo:") or "ncclDevKernel" in name or "ncclKernel" in name


def _is_on_host(record: Any) -> bool:
    return bool(record.device_type() == DeviceType.CPU)


def _event(record: Any) -> Event:
    name, on_device = record.name(), not _is_on_host(record)
    sized = name.startswith(("gloo:", "nccl:", "c10d::"))
    return Event(
        name=name,
        start=record.start_ns(),
        end=record.end_ns(),
        thread=record.start_thread_id(),
        forward_thread=record.fwd_thread_id(),
        sequence=record.sequence_nr(),
        is_async=record.is_async(),
        on_device=on_device,
        is_range=record.is_user_annotation(),
        correlation=_correlation(record, on_device=on_device),
        n_bytes=_bytes_handed_in(name, record.structured_input_shapes(), record.dtypes()) if sized else 0,
    )


def _correlation(record: Any, *, on_device: bool) -> int:
    linked = int(record.linked_correlation_id())
    # Calls of the driver are linked as kernels are, and their own numbers are of another kind than operators'.
    return linked if on_device else 0 if linked else int(record.correlation_id())


def _bytes_handed_in(name: str, shapes: Iterable[Any], dtypes: Iterable[str]) -> int:
    """Bytes of the first tensor, or of the first list of tensors, that is no result."""
    sizes = []
    for shape, dtype in zip(shapes, dtypes, strict=False):
        if shape and isinstance(shape[0], (list, tuple)):
            sizes.append(sum(int(math.prod(each)) for each in shape) * _ITEMSIZE.get(dtype, 4))
        elif shape and dtype in _ITEMSIZE:
            sizes.append(int(math.prod(shape)) * _ITEMSIZE[dtype])
    return next(iter(sizes[name in _RESULT_FIRST :]), 0)
