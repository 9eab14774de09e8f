"""The private names of torch that compression leans on are still there and mean the same."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient import _compat
from lightning_efficient.compression import ACPSGD, register_compressor
from tests.support.ranks import run_ranks


def _hooks(rank: int, world_size: int) -> tuple[bool, bool, bool]:
    bare, ours, other = (DistributedDataParallel(nn.Linear(20, 20)) for _ in range(3))
    register_compressor(ours, ACPSGD(rank=2))
    other.register_comm_hook(None, _other_hook)
    return _compat.has_comm_hook(bare), _compat.has_comm_hook(ours), _compat.has_comm_hook(other)


def _other_hook(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    raise AssertionError("no backward in this test")


@pytest.mark.distributed
def test_has_comm_hook_sees_ours_and_others() -> None:
    assert run_ranks(_hooks, 2) == [(False, True, True)] * 2


def test_grad_bucket_is_the_class_that_ddp_checks_annotations_against() -> None:
    assert _compat.GradBucket is torch.distributed.GradBucket
