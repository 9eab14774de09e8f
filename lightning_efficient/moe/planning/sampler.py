"""Times collectives, and work of the device, on all ranks at once: they share links and cores, as in a layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import override

from lightning_efficient._links import collective_of, synchronize, wait_for
from lightning_efficient.moe.planning.links import Sampler
from lightning_efficient.moe.planning.steps import Op
from lightning_efficient.moe.topology import Axis, Group, MoETopology

_SIDE = 192


class Clock:
    """Runs something on all ranks at the same time, and tells each how long the slowest took.

    Args:
        topology: the groups.
        device: whose work is waited for.
        timeout_s: seconds after which the network counts as stuck.
    """

    def __init__(self, topology: MoETopology, *, device: torch.device, timeout_s: float = 60.0) -> None:
        self.topology, self.device, self.timeout_s = topology, device, timeout_s
        backend = dist.get_backend(topology.world.process_group) if topology.world.size > 1 else ""
        self._on = device if "nccl" in backend else torch.device("cpu")

    def time(self, run: Callable[[], object]) -> float:
        """Return the seconds of the slowest rank."""
        return self.slowest(self.own_time(run))[0]

    def own_time(self, run: Callable[[], object]) -> float:
        """Return the seconds of this rank, which begins together with all."""
        self.slowest(0.0)
        begin = time.perf_counter()
        run()
        synchronize(self.device)
        return time.perf_counter() - begin

    def slowest(self, *values: float) -> list[float]:
        """Return the highest of each value over the ranks."""
        if self.topology.world.size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.float64, device=self._on)
        work = dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.topology.world.process_group, async_op=True)
        self.wait(work, "the ranks' agreement")
        highest: list[float] = agreed.tolist()
        return highest

    def wait(self, work: Any, what: str) -> None:
        """Wait for a collective."""
        wait_for(work, what=what, timeout_s=self.timeout_s, device=self.device)


class GroupSampler(Sampler):
    """Times the collectives of a topology.

    Args:
        clock: of all its ranks.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._made: dict[tuple[Op, Axis, int], Callable[[], Any]] = {}
        self._factor = torch.randn(_SIDE, _SIDE, device=clock.device, generator=_generator(clock.device))
        self._device_s: float | None = None

    @override
    def alone(self, op: Op, axis: Axis, n_bytes: int, *, calls: int) -> float:
        start = self._starts(op, axis, n_bytes)

        def run() -> None:
            for _ in range(calls):
                self._clock.wait(start(), f"{op} over {axis}")

        return self._clock.time(run) / calls

    @override
    def together(self, first: tuple[Op, Axis, int], second: tuple[Op, Axis, int]) -> float:
        starts = [self._starts(*first), self._starts(*second)]

        def run() -> None:
            for work in [start() for start in starts]:
                self._clock.wait(work, f"{first[0]} over {first[1]} beside {second[0]} over {second[1]}")

        return self._clock.time(run)

    @override
    def beside_device(self, link: tuple[Op, Axis, int], seconds: float) -> tuple[float, float]:
        start = self._starts(*link)
        times = max(1, round(seconds / self._product_s()))

        def run() -> None:
            work = start()
            self._products(times)
            self._clock.wait(work, f"{link[0]} over {link[1]} beside the device")

        return self._clock.time(lambda: self._products(times)), self._clock.time(run)

    def _starts(self, op: Op, axis: Axis, n_bytes: int) -> Callable[[], Any]:
        key = op, axis, n_bytes
        if key not in self._made:
            group: Group = getattr(self._clock.topology, axis)
            # Communication tensors live where the layer's do.
            self._made[key] = collective_of(op, n_bytes, group=group.process_group, device=self._clock.device)[1]
        return self._made[key]

    def _products(self, times: int) -> None:
        for _ in range(times):
            torch.mm(self._factor, self._factor)

    def _product_s(self) -> float:
        if self._device_s is None:
            self._products(4)
            self._device_s = max(self._clock.time(lambda: self._products(16)) / 16, 1e-7)
        return self._device_s


def _generator(device: torch.device) -> torch.Generator:
    """One of its own: measuring draws nothing from the generators of the training."""
    return torch.Generator(device).manual_seed(0)
