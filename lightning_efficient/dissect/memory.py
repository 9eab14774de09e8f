"""Peak memory of a window of steps, and the bytes of a training's lasting state."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient._compat import plain_parts, storage_address
from lightning_efficient.dissect.tensors import tensors_in

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """The most memory that this process used in a window.

    On CUDA it is what torch's allocator gave out, on one device. On a CPU under Linux it is the resident memory of the
    whole process, whose high-water mark the kernel keeps; elsewhere nothing is known.

    Args:
        device: where the training runs.

    Attributes:
        reason: why :meth:`read` returns None; empty where it does not.

    Example:
        >>> peak = PeakMemory(torch.device("cpu"))
        >>> peak.reset()
        >>> peak_bytes, reserved_bytes = peak.read()
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reason = ""
        if device.type == "cpu" and not (sys.platform == "linux" and _CLEAR.exists() and _STATUS.exists()):
            self.reason = f"the peak of resident memory cannot be reset on {sys.platform}, only under Linux with /proc"
        elif device.type not in ("cpu", "cuda"):
            self.reason = f"the peak memory of {device.type} devices is not read"

    def reset(self) -> None:
        """Begin a window."""
        if self.reason:
            return
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            _CLEAR.write_text("5")  # proc(5): resets the peak resident set size to the current one
        except OSError as error:
            self.reason = f"the peak of resident memory cannot be reset ({error})"

    def read(self) -> tuple[int | None, int | None]:
        """Return the peak since :meth:`reset`, and on CUDA the peak that the allocator held, in bytes."""
        if self.reason:
            return None, None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024, None
        self.reason = "the kernel does not report VmHWM"
        return None, None


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes that stay between steps, on this rank.

    Attributes:
        parameter_bytes: parameters and buffers.
        gradient_bytes: gradients that are there now.
        optimizer_bytes: tensors in the optimizers' state.
    """

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


def state_bytes(module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> StateBytes:
    """Count the bytes of parameters, gradients and optimizer state, each storage once.

    Tied weights and views of one storage count once, a DTensor by its part on this rank, a quantised tensor by the
    tensors that it is made of.

    Args:
        module: the model.
        optimizers: whose state to count; what is already counted as a parameter is not counted again.
    """
    seen: set[int] = set()
    parameters = _count([*module.parameters(), *module.buffers()], seen)
    gradients = _count([each.grad for each in module.parameters() if each.grad is not None], seen)
    states = [list(tensors_in(optimizer.state)) for optimizer in optimizers]
    return StateBytes(parameters, gradients, _count([tensor for state in states for tensor in state], seen))


def _count(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for part in (part for tensor in tensors for whole in (tensor, *_scales(tensor)) for part in plain_parts(whole)):
        key = storage_address(part)
        if key not in seen:
            seen.add(key)
            total += part.untyped_storage().nbytes()
    return total


def _scales(tensor: Tensor) -> Iterator[Tensor]:
    """What bitsandbytes keeps beside a quantised weight, as attributes of the parameter."""
    for value in (getattr(tensor, "quant_state", None), getattr(tensor, "CB", None), getattr(tensor, "SCB", None)):
        while value is not None and not isinstance(value, Tensor):
            yield from tensors_in(vars(value))
            value = getattr(value, "state2", None)  # its scales may be quantised in turn
        yield from tensors_in(value)
