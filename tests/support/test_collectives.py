"""The count must see what DDP's C++ reducer sends, not only what Python asked for."""

import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.support.collectives import Collective, count_collectives
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _explicit(rank: int, world_size: int) -> tuple[list[Collective], int, tuple[int, int]]:
    dist.all_reduce(torch.ones(7))  # outside: must not be counted
    began = time.time_ns()
    with count_collectives() as seen:
        dist.all_reduce(torch.ones(3, 5, dtype=torch.float64))
        dist.all_gather([torch.empty(2, dtype=torch.bfloat16) for _ in range(world_size)], torch.ones(2).bfloat16())
        dist.broadcast(torch.ones(4, dtype=torch.uint8), 0)
    return seen, threading.get_ident(), (began, time.time_ns())


def _backward(rank: int, world_size: int, hook: bool) -> tuple[list[Collective], list[Collective]]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50)), bucket_cap_mb=0.001)
    if hook:
        model.register_comm_hook(None, _all_reduce_hook)
    for _ in range(2):  # DDP rebuilds its buckets after the first
        model(torch.ones(1, 50)).sum().backward()
    with count_collectives() as synced:
        model(torch.ones(1, 50)).sum().backward()
    with model.no_sync(), count_collectives() as silent:
        model(torch.ones(1, 50)).sum().backward()
    return synced, silent


def _all_reduce_hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda fut: fut.value()[0])  # type: ignore[no-any-return]


def _none(rank: int, world_size: int) -> None:
    with count_collectives():
        pass


def test_each_collective_is_told_with_size_dtype_thread_and_time() -> None:
    for seen, thread, (began, ended) in run_ranks(_explicit, 2):
        assert [(c.op, c.numel, c.dtype, c.nbytes) for c in seen] == [
            ("all_reduce", 15, "Double", 120),
            ("all_gather", 2, "BFloat16", 4),
            ("broadcast", 4, "Byte", 4),
        ]
        assert {c.thread_id for c in seen} == {thread}
        assert [began, *(c.time_ns for c in seen), ended] == sorted([began, *(c.time_ns for c in seen), ended])


@pytest.mark.parametrize("hook", [False, True], ids=["C++ reducer", "Python hook"])
def test_ddp_is_seen_to_send_each_gradient_once_and_nothing_in_no_sync(hook: bool) -> None:
    for synced, silent in run_ranks(_backward, 2, hook):
        assert {c.op for c in synced} == {"all_reduce"}
        assert len(synced) > 1
        assert sum(c.numel for c in synced) == 2 * (50 * 50 + 50)
        assert silent == []


def test_counting_without_the_recorder_is_refused() -> None:
    with pytest.raises(AssertionError, match="TORCH_FR_BUFFER_SIZE"):
        run_ranks(_none, 1, env={"TORCH_FR_BUFFER_SIZE": "0"})
