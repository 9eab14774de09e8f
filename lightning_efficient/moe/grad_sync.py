r"""Gradients of a model with MoE layers, made whole across ranks, while backward still runs.

Every parameter has one of three rules. With P ranks, DP = P / MP groups of tokens, and losses that are means over a
rank's own tokens:

======== ========================= ================= ====================================================
what     sum over                  divide by         because
======== ========================= ================= ====================================================
dense    DP                        DP                MP ranks have the same gradient already
router   all ranks                 DP                each MP rank has a share, whatever the schedule
experts  EDP (ranks with the same  DP (not EDP)      the rows of all DP groups reached some copy, each once
         experts)
======== ========================= ================= ====================================================

Parameters that FSDP2 shards over data parallelism are left alone: it reduces them itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lightning_efficient._compat import revive_gradient_hooks
from lightning_efficient.moe.experts import local
from lightning_efficient.moe.layer import moe_layers
from lightning_efficient.moe.topology import Group, MoETopology
from lightning_efficient.moe.traffic import Traffic


@dataclass(slots=True)
class Bucket:
    """Parameters whose gradients are summed together.

    Args:
        group: over which.
        parameters: of one dtype and device, in the order of the buffer.
        waiting: how many have no gradient yet in this backward.
        flat: the gradients in one tensor, and a 1 for each parameter that has one, once they are under way.
        work: what to wait for.
    """

    group: Group
    parameters: list[nn.Parameter] = field(default_factory=list)
    waiting: int = 0
    flat: Tensor | None = None
    work: Any = None


class GradientSync:
    """Sums gradients in buckets, each as soon as all of its gradients are there.

    Args:
        module: after :func:`~lightning_efficient.moe.parallelize`.
        topology: the groups.
        bucket_mb: size of a bucket in MB.

    Attributes:
        enabled: whether backward syncs; switch it off for all but the last micro-batch of a step.
        sent: buckets that were sent.
        overlapped: those of them that left before backward ended.
        traffic: what was sent.
    """

    def __init__(self, module: nn.Module, topology: MoETopology, *, bucket_mb: float = 25.0) -> None:
        self.topology = topology
        self.enabled = True
        self.sent = self.overlapped = 0
        self.traffic = Traffic()
        self._bucket_mb = bucket_mb
        self._whole: set[Tensor] = set()  # whose .grad is of an earlier backward, and whole
        self._held: dict[Tensor, Tensor] = {}
        self._attach(module)

    def _attach(self, module: nn.Module) -> None:
        self.buckets = _bucket(module, self.topology, self._bucket_mb)
        self._bucket_of = {parameter: bucket for bucket in self.buckets for parameter in bucket.parameters}
        for each in self._bucket_of:
            revive_gradient_hooks(each)
        self._hooks = [each.register_post_accumulate_grad_hook(self._ready) for each in self._bucket_of]
        self._count_anew()

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def begin(self, module: nn.Module) -> None:
        """Prepare for a backward whose gradients come on top of whole ones, or after parameters were unfrozen.

        A loop that sets gradients to None after each step, and freezes nothing, need not call it.

        Args:
            module: the same one.
        """
        self._held = {each: grad for each, grad in self._held.items() if each.grad is not None}  # not zeroed since
        for each in self._whole:
            if each.grad is not None:  # only what this backward adds is to be summed over ranks
                self._held[each], each.grad = each.grad, None
        self._whole.clear()
        if any(
            each.requires_grad and each not in self._bucket_of and not _is_fully_sharded(each)
            for each in module.parameters()
        ):
            self.remove()
            self._attach(module)

    def finish(self) -> None:
        """Send what backward has not, wait for all, and leave the whole gradients in ``.grad``.

        Call it after each backward; nothing is done while ``enabled`` is False. A parameter that no rank used keeps
        no gradient; one that some rank used has one on all.
        """
        if not self.enabled:
            for each in [each for each in self._held if each.grad is None]:  # this backward did not use it
                each.grad = self._held.pop(each)
                self._whole.add(each)
            return
        self.overlapped += sum(bucket.work is not None for bucket in self.buckets)
        while self._next < len(self.buckets):
            self._send()
        for bucket in self.buckets:
            self._unpack(bucket)
        self._count_anew()

    def _count_anew(self) -> None:
        self._next = 0
        for bucket in self.buckets:
            bucket.waiting = len(bucket.parameters)

    def _ready(self, parameter: Tensor) -> None:
        if not self.enabled:
            return
        bucket = self._bucket_of[parameter]  # type: ignore[index]
        if bucket.flat is not None:
            raise RuntimeError(
                f"A gradient of shape {tuple(parameter.shape)} came after it was sent: backward ran twice. Call "
                "finish() after each backward, or set enabled=False for all but the last."
            )
        bucket.waiting -= 1
        # In one order on all ranks, whatever the order in which gradients come.
        while self._next < len(self.buckets) and self.buckets[self._next].waiting <= 0:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[self._next]
        self._next += 1
        for each in bucket.parameters:
            _add_up_parts(each)
        grads = [None if each.grad is None else local(each.grad) for each in bucket.parameters]
        if bucket.group.size == 1:
            return
        used = torch.tensor([each is not None for each in grads], dtype=bucket.parameters[0].dtype)
        parts = [
            torch.zeros_like(local(each)) if grad is None else grad
            for each, grad in zip(bucket.parameters, grads, strict=True)
        ]
        device = parts[0].device
        bucket.flat = torch.cat([*(each.flatten() for each in parts), used.to(device, non_blocking=True)])
        bucket.work = dist.all_reduce(bucket.flat, group=bucket.group.process_group, async_op=True)
        n = bucket.group.size
        self.sent += 1
        self.traffic.add(
            "all_reduce", bucket.group.axis, 2 * bucket.flat.numel() * (n - 1) / n, bucket.flat.element_size()
        )

    def _unpack(self, bucket: Bucket) -> None:
        by = self.topology.dp.size
        if bucket.flat is not None:
            self._unpack_flat(bucket, by)
        elif by > 1:
            for each in bucket.parameters:
                if each.grad is not None:
                    local(each.grad).div_(by)
        for each in bucket.parameters:
            held = self._held.pop(each, None)
            if held is not None:
                if each.grad is not None:
                    local(held).add_(local(each.grad))  # DTensor's own add_ plans for a second or so, at each shape
                each.grad = held
            if each.grad is not None:
                self._whole.add(each)

    def _unpack_flat(self, bucket: Bucket, by: int) -> None:
        assert bucket.flat is not None
        bucket.work.wait()
        if by > 1:
            bucket.flat.div_(by)
        sizes = [local(each).numel() for each in bucket.parameters]
        *grads, used = bucket.flat.split([*sizes, len(sizes)])
        missing = any(each.grad is None for each in bucket.parameters)
        by_some = used.tolist() if missing else [True] * len(grads)
        for each, grad, is_used in zip(bucket.parameters, grads, by_some, strict=True):
            if is_used:
                _set_grad(each, grad.view_as(local(each)))
        bucket.flat = bucket.work = None


def _add_up_parts(parameter: nn.Parameter) -> None:
    """Make the gradient whole where tensor parallelism left parts of a sum, as for norms in sequence parallelism."""
    grad = parameter.grad
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        parameter.grad = grad.redistribute(placements=parameter.placements)


def _set_grad(parameter: nn.Parameter, grad: Tensor) -> None:
    if isinstance(parameter, DTensor):
        grad = DTensor.from_local(
            grad,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    parameter.grad = grad


def _bucket(module: nn.Module, topology: MoETopology, bucket_mb: float) -> list[Bucket]:
    """Cut the parameters, from the last to the first, into buckets of one group, dtype and device.

    In the order in which backward fills them: those of small parameters reach over many layers, and the others must not
    wait for them.
    """
    groups = dict(_groups(module, topology))
    buckets: dict[int, Bucket] = {}
    open_buckets: dict[Any, tuple[Bucket, float]] = {}
    for parameter in reversed(list(module.parameters())):
        if not parameter.requires_grad or _is_fully_sharded(parameter):
            continue
        group = groups.get(parameter, topology.dp)
        size = local(parameter).numel() * parameter.element_size() / 1e6
        key = (group.axis, parameter.dtype, parameter.device)
        bucket, filled = open_buckets.get(key, (None, 0.0))
        if bucket is None or filled + size > bucket_mb:
            bucket, filled = Bucket(group), 0.0
        buckets.pop(id(bucket), None)
        buckets[id(bucket)] = bucket
        bucket.parameters.append(parameter)
        open_buckets[key] = (bucket, filled + size)
    return list(buckets.values())


def _groups(module: nn.Module, topology: MoETopology) -> Iterable[tuple[nn.Parameter, Group]]:
    for _, layer in moe_layers(module):
        for parameter in layer.experts.parameters():
            yield parameter, topology.edp
        for parameter in layer.router.parameters():
            yield parameter, topology.world


def _is_fully_sharded(parameter: nn.Parameter) -> bool:
    """Whether FSDP2 has cut it over the data-parallel ranks."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return any(
        name == "data_parallel" and isinstance(placement, Shard)
        for name, placement in zip(names, parameter.placements, strict=True)
    )
