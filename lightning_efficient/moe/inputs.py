"""Checks that ranks agree before they send each other rows: where they do not, a collective would hang or abort."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_efficient.moe.topology import Group, MoETopology


class InputCheck:
    """Compares the tokens of a layer across ranks, in one small all-reduce.

    Args:
        name: of the layer, for the error.
        topology: the groups.
        values: compare the tokens of each MP group, too, not only how many they are.
    """

    def __init__(self, name: str, topology: MoETopology, *, values: bool = False) -> None:
        self.name, self.topology, self.values = name, topology, values

    def __call__(self, x_SM: Tensor) -> None:
        """Check, on all ranks together.

        Raises:
            ValueError: on every rank: the numbers of tokens differ, or the tokens of an MP group.
        """
        if self.topology.world_size == 1:
            return
        most, least = self._extremes(torch.tensor([x_SM.shape[0]], device=x_SM.device), self.topology.world)
        if most != least:
            raise ValueError(
                f"{self.name} got {int(least)} tokens on one rank and {int(most)} on another: experts are shared, so "
                "all ranks must bring equally many. Pad the batches to one length, and set drop_last=True in the "
                "DataLoader."
            )
        if self.values and self.topology.mp.size > 1:
            self._check_values(x_SM)

    def _check_values(self, x_SM: Tensor) -> None:
        given = x_SM.detach().to(torch.promote_types(x_SM.dtype, torch.float32))
        wide = given.where(given.isfinite(), 0.0)  # NaN equals nothing, and inf hides what else there is
        order = torch.arange(len(wide), device=wide.device)[:, None]
        sums_M = torch.cat((wide.sum(0), (wide * order).sum(0), (~given.isfinite() * (order + 1)).sum(0)))
        most, least = self._extremes(sums_M, self.topology.mp)
        apart = (most - least).abs().max()
        # One answer for all ranks: a group that agrees must not go on alone.
        dist.all_reduce(apart, op=dist.ReduceOp.MAX, group=self.topology.world.process_group)
        if apart > 0:
            raise ValueError(
                f"The tokens of {self.name} differ across an MP group (checksums by {float(apart):.3g}): its ranks "
                "share the work on the same tokens. Feed the same batch to all of them (let the strategy make the "
                "sampler), seed dropout equally, or set model_parallel_size=1."
            )

    @staticmethod
    def _extremes(x: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        both = torch.cat((x, -x))
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group.process_group)
        most, negative_least = both.chunk(2)
        return most, -negative_least
