"""Memory of a training step, predicted without having it: the step runs on tensors that have shapes alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_efficient._compat import FakeTensorMode, TorchDispatchMode, fake_tensor_errors, storage_address
from lightning_efficient._saved_bytes import saved_bytes
from lightning_efficient.dissect.memory import state_bytes
from lightning_efficient.dissect.tensors import tensors_in

BatchT = TypeVar("BatchT")

BLOCK = 512
"""CUDA's caching allocator hands out multiples of so many bytes."""


@dataclass(frozen=True, slots=True)
class MemoryPrediction:
    """Bytes on one device.

    Attributes:
        parameter_bytes: parameters and buffers.
        gradient_bytes: gradients after backward.
        optimizer_bytes: the optimizer's state.
        saved_bytes: kept by forward for backward, without parameters and buffers.
        peak_bytes: most that lives at once in a step after the first, each tensor rounded up to a block: what
            ``torch.cuda.max_memory_allocated`` reads, but for workspaces inside of operators.
        peak_at: where the peak is: ``forward``, ``backward`` or ``optimizer``.
    """

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    peak_bytes: int
    peak_at: str


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all storages that operators make while it is entered.

    Args:
        block: each storage counts as a multiple of so many bytes.

    Attributes:
        now: bytes that live.
        peak: most that lived at once since :meth:`reset_peak`.
    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._block = block
        self._alive: dict[int, weakref.ref[Any]] = {}

    def reset_peak(self) -> None:
        """Begin a window."""
        self.peak = self.now

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tensors_in(result):
            self._follow(each)
        return result

    def _follow(self, tensor: Tensor) -> None:
        key = storage_address(tensor)
        if key in self._alive:
            return
        storage = tensor.untyped_storage()
        size = -(-storage.nbytes() // self._block) * self._block

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def predict_memory(
    build_module: Callable[[], nn.Module],
    make_batch: Callable[[], BatchT],
    *,
    run: Callable[[Any, BatchT], Tensor],
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    device: str | torch.device = "cpu",
    block: int = BLOCK,
) -> MemoryPrediction:
    r"""Run two training steps without memory, and report what they would hold.

    .. math:: \text{peak} = \max_t \sum_{s \in \text{alive}(t)} b \, \lceil \text{bytes}(s) / b \rceil

    over the storages :math:`s` that operators return, in blocks of :math:`b`. The time :math:`t` goes through the
    second step: forward, backward, and the optimizer, whose state is there since the first. It takes seconds for a
    model of billions of parameters.

    The operators are those of ``device``. Without a GPU take the CPU's, which keep the same in all but fused attention.

    Args:
        build_module: makes the model, in the type and mode in which it trains, casts last; tensors that it makes on no
            device by name have no memory, and are taken for 1 where it looks at one.
        make_batch: makes a batch; its values are never looked at.
        run: given both, returns the loss, a scalar.
        optimizer: called with the parameters that train. Say ``foreach`` or ``fused`` where it matters: their
            temporaries differ, and torch's own choice is another on tensors without memory.
        device: whose operators to run; ``cuda`` needs a GPU, of which nothing is used.
        block: allocations are multiples of so many bytes.

    Raises:
        ValueError: there is no such device, no parameter trains, or the step looks at values, which there are none of.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "There is no GPU here, so torch cannot say which operators would run on one. Predict with device='cpu', "
            "which differs in fused attention alone."
        )
    # Not built under FakeTensorMode: its parameters cannot be cast by Module.to.
    with torch.device("meta"), _Ones():  # type: ignore[no-untyped-call]
        module = build_module()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), LiveBytes(block) as live:
            _give_device(module)
            return _two_steps(live, module, make_batch(), run, optimizer)
    except fake_tensor_errors() as error:
        raise ValueError(
            f"The step looks at the values of a tensor ({error}), and a prediction has shapes alone. Leave that part "
            "out of run, or measure with Dissect instead."
        ) from error


class _Ones(TorchDispatchMode):
    """Answers whoever looks at a value of a tensor without memory: checks of drawn weights, say."""

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype, device="cpu").item()
        return func(*args, **(kwargs or {}))


def _give_device(module: nn.Module) -> None:
    """Replace tensors on the meta device by those that claim to be on the default device, tied ones by the same."""
    made: dict[int, Tensor] = {}

    def replacement(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            made[id(tensor)] = nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like
        return made[id(tensor)]

    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = replacement(tensor)  # type: ignore[assignment]


def _two_steps(
    live: LiveBytes,
    module: nn.Module,
    batch: BatchT,
    run: Callable[[Any, BatchT], Tensor],
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
) -> MemoryPrediction:
    trained = [each for each in module.parameters() if each.requires_grad]
    if not trained:
        raise ValueError("No parameter of the module trains: there is no step to predict. Set requires_grad on some.")
    optimizer = make_optimizer(trained)
    with saved_bytes(module=module) as kept:
        loss = run(module, batch)
    loss.backward()
    state_gradients = state_bytes(module).gradient_bytes
    optimizer.step()
    optimizer.zero_grad()
    del loss

    peaks = {}
    live.reset_peak()
    loss = run(module, batch)
    peaks["forward"] = live.peak
    live.reset_peak()
    loss.backward()
    del loss
    peaks["backward"] = live.peak
    live.reset_peak()
    optimizer.step()
    peaks["optimizer"] = live.peak
    state = state_bytes(module, [optimizer])
    peak_at = max(peaks, key=peaks.__getitem__)
    return MemoryPrediction(
        parameter_bytes=state.parameter_bytes,
        gradient_bytes=state_gradients,
        optimizer_bytes=state.optimizer_bytes,
        saved_bytes=kept.total,
        peak_bytes=peaks[peak_at],
        peak_at=peak_at,
    )
