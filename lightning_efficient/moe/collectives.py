"""Collectives of MoE layers, each with the backward that its use calls for.

A collective has several adjoints, by what is done with its result. They are the gradient rules of section 2.7 of the
research: those that bit named projects. In the table, "replicated" means that all ranks of the group hold the same
value and compute the same from it, so that the gradients they hold are equal, too, and whole.

========================= =================== ==================== ==================================================
function                  forward             backward             use
========================= =================== ==================== ==================================================
:func:`all_to_all`        all-to-all          all-to-all           rows to the owners of their experts, and back
:func:`split`             slice               all-gather           replicated value, each rank goes on with its part
:func:`merge`             all-gather          slice                parts, from which a replicated value is made
:func:`gather`            all-gather          reduce-scatter       parts, of which every rank computes a share
:func:`reduce_scatter`    reduce-scatter      all-gather           shares, of which every rank keeps the sum of a part
:func:`all_reduce`        all-reduce          all-reduce           shares, whose sum is used differently by each rank
:func:`sum_shares`        all-reduce          identity             shares, whose sum is replicated
:func:`replicated`        identity            all-reduce           replicated value, of which each computes a share
========================= =================== ==================== ==================================================

Parts lie along the first dimension, in the order of the ranks. Each function has a twin in two halves, :func:`start`
and :func:`wait`: what runs between them overlaps with the collective, in forward and in backward alike, since the
backward of ``wait`` starts the adjoint and that of ``start`` waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from typing_extensions import override

from lightning_efficient.moe.topology import Group
from lightning_efficient.moe.traffic import note

Raw: TypeAlias = Callable[[Tensor, Group, bool], tuple[Tensor, Any]]
"""Takes a contiguous tensor, the group, and whether not to wait; returns the result and what to wait for, or None."""

# Older names are deprecated from torch 2.13 on.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _raw_all_to_all(x: Tensor, group: Group, asynchronous: bool) -> tuple[Tensor, Any]:
    out = torch.empty_like(x)
    note("all_to_all", group.axis, x.numel() * (group.size - 1) / group.size, x.element_size())
    return out, dist.all_to_all_single(out, x, group=group.process_group, async_op=asynchronous)


def _raw_all_gather(x: Tensor, group: Group, asynchronous: bool) -> tuple[Tensor, Any]:
    out = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    note("all_gather", group.axis, x.numel() * (group.size - 1), x.element_size())
    return out, _all_gather(out, x, group=group.process_group, async_op=asynchronous)


def _raw_reduce_scatter(x: Tensor, group: Group, asynchronous: bool) -> tuple[Tensor, Any]:
    out = x.new_empty((x.shape[0] // group.size, *x.shape[1:]))
    note("reduce_scatter", group.axis, x.numel() * (group.size - 1) / group.size, x.element_size())
    return out, _reduce_scatter(out, x, group=group.process_group, async_op=asynchronous)


def _raw_all_reduce(x: Tensor, group: Group, asynchronous: bool) -> tuple[Tensor, Any]:
    out = x.clone()
    note("all_reduce", group.axis, 2 * x.numel() * (group.size - 1) / group.size, x.element_size())
    return out, dist.all_reduce(out, group=group.process_group, async_op=asynchronous)


def _raw_slice(x: Tensor, group: Group, asynchronous: bool) -> tuple[Tensor, Any]:
    return x.chunk(group.size)[group.rank], None


def _raw_identity(x: Tensor, group: Group, asynchronous: bool) -> tuple[Tensor, Any]:
    return x.view_as(x), None


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective and its adjoint.

    Args:
        forward: what it does.
        backward: what it does to gradients.
    """

    forward: Raw
    backward: Raw

    def __call__(self, x: Tensor, group: Group) -> Tensor:
        """Run it and wait.

        Args:
            x: the own part, contiguous along the first dimension.
            group: who takes part. With one rank nothing happens.
        """
        if group.size == 1:
            return x
        out: Tensor = _Run.apply(x, group, self)  # type: ignore[no-untyped-call]
        return out


all_to_all = Collective(_raw_all_to_all, _raw_all_to_all)
split = Collective(_raw_slice, _raw_all_gather)
merge = Collective(_raw_all_gather, _raw_slice)
gather = Collective(_raw_all_gather, _raw_reduce_scatter)
reduce_scatter = Collective(_raw_reduce_scatter, _raw_all_gather)
all_reduce = Collective(_raw_all_reduce, _raw_all_reduce)
sum_shares = Collective(_raw_all_reduce, _raw_identity)
replicated = Collective(_raw_identity, _raw_all_reduce)


class _Run(Function):
    """The collective at once; backward likewise."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, group: Group, collective: Collective) -> Tensor:
        ctx.group, ctx.collective = group, collective
        return collective.forward(x.contiguous(), group, False)[0]

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.collective.backward(grads[0].contiguous(), ctx.group, False)[0], None, None


@dataclass(slots=True)
class Flight:
    """A collective that was started: its unfinished result, and what to wait for.

    Args:
        group: who takes part.
        collective: which it is.
        token: carries the graph from the start to the wait; it has the shape of the input, and no values. None after
            the wait: the graph holds the flight, and a flight that held the graph would keep it for ever.
        out: the result, not to be read before :func:`wait`.
        work: what to wait for; None: it is done.
    """

    group: Group
    collective: Collective
    token: Tensor | None
    out: Tensor | None = None
    work: Any = None

    def finish(self) -> None:
        """Wait."""
        if self.work is not None:
            self.work.wait()
            self.work = None


def start(x: Tensor, group: Group, collective: Collective) -> Flight:
    """Start a collective without waiting for it.

    Args:
        x: as the collective takes it.
        group: who takes part.
        collective: one of this module.

    Returns:
        What :func:`wait` takes, once. Flights of one group must be started in the same order on all its ranks.
    """
    flight = Flight(group, collective, x)
    if group.size > 1:
        flight.token = _Start.apply(x, flight)  # type: ignore[no-untyped-call]
    return flight


def wait(flight: Flight) -> Tensor:
    """Wait for a started collective and return its result."""
    token, flight.token = flight.token, None
    assert token is not None, "a flight is waited for once"
    if flight.group.size == 1:
        return token
    out: Tensor = _Wait.apply(token, flight)  # type: ignore[no-untyped-call]
    return out


class _Start(Function):
    """Forward starts; backward ends what the backward of `_Wait` started."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.out, flight.work = flight.collective.forward(x.contiguous(), flight.group, True)
        return x.new_empty(1).expand_as(x)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.flight.finish()
        return grads[0], None


class _Wait(Function):
    """Forward ends what `_Start` started; backward starts the adjoint."""

    @staticmethod
    @override
    def forward(ctx: Any, token: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.finish()
        out, flight.out = flight.out, None
        assert out is not None
        return out

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Any:
        flight: Flight = ctx.flight
        grad, flight.work = flight.collective.backward(grads[0].contiguous(), flight.group, True)
        return grad, None
