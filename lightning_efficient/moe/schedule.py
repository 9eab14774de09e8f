"""The names of the schedules, and what each is made of.

A schedule moves the rows of tokens to the ranks that own their experts and back. It is five choices:

======== ===================================================================================================
split    which part of the tokens a rank of an MP group takes: those of the ESP group besides its own
         (``gather``, the paper's baseline), its 1/MP of the tokens before the gate (``before``), or its 1/MP of
         the experts' slots after it (``after``)
transport how rows travel: one all-to-all over the block, with a copy for each shard (``fused``); an all-to-all
         over EP, then an all-gather over ESP, and back by a reduce-scatter (``hierarchical``), or back by an
         all-reduce of which each rank keeps its part (``all_reduce``); or, where all ranks of an ESP group have the
         same rows, an all-to-all over EP, and an all-reduce on the way back (``plain``)
chunks   into how many parts the slots are cut, so that the parts' communication and computation overlap
overlap  what overlaps: everything (``layer``), or only the way back, the all-to-all with the all-gather over MP
         (``merge``: the paper's SAA)
packed   whether only the slots that are filled are sent and computed. Numbers of rows are exchanged before, and the
         host waits for them; results are the same
======== ===================================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Split: TypeAlias = Literal["gather", "before", "after"]
Transport: TypeAlias = Literal["fused", "hierarchical", "all_reduce", "plain"]
Overlap: TypeAlias = Literal["layer", "merge"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a mixture-of-experts layer communicates.

    Args:
        name: as users write it.
        split: which part of the tokens a rank takes.
        transport: how rows travel.
        chunks: into how many parts the slots are cut.
        overlap: what overlaps, where there is more than one chunk.
        packed: send filled slots only; without a capacity that is so anyway.
    """

    name: str
    split: Split
    transport: Transport
    chunks: int = 1
    overlap: Overlap = "layer"
    packed: bool = False

    def with_chunks(self, chunks: int) -> Schedule:
        """Return the same schedule in another number of chunks.

        Raises:
            ValueError: the number is below 1, or the schedule cannot be cut.
        """
        if chunks < 1:
            raise ValueError(f"chunks is {chunks}: a layer runs in 1 part or more. Set it to 1 or more.")
        if chunks > 1 and not self.can_be_chunked:
            raise ValueError(
                f"chunks={chunks} with schedule {self.name!r}: that baseline runs in one part. Set chunks to 1, or "
                f"choose one of {', '.join(name for name, each in SCHEDULES.items() if each.can_be_chunked)}."
            )
        return replace(self, chunks=chunks)

    @property
    def can_be_chunked(self) -> bool:
        """Whether it may run in more than one chunk: the two baselines may not."""
        return self.name not in ("paper", "deepspeed")

    @property
    def label(self) -> str:
        """Name and chunks, as tables show them: ``s1_hier/4``."""
        return self.name if self.chunks == 1 else f"{self.name}/{self.chunks}"

    @property
    def drops_by_slice(self) -> bool:
        """Whether capacity is counted on 1/MP of the tokens, so that other tokens may drop than with the others."""
        return self.split == "before"


SCHEDULES: dict[str, Schedule] = {
    each.name: each
    for each in (
        Schedule("paper", "gather", "plain"),
        Schedule("deepspeed", "after", "all_reduce"),
        Schedule("s1", "before", "fused"),
        Schedule("s2", "after", "fused"),
        Schedule("s2_saa", "after", "fused", overlap="merge"),
        Schedule("s1_hier", "before", "hierarchical"),
        Schedule("s2_hier", "after", "hierarchical"),
        Schedule("s1_packed", "before", "fused", packed=True),
        Schedule("s2_packed", "after", "fused", packed=True),
        Schedule("s1_hier_packed", "before", "hierarchical", packed=True),
        Schedule("s2_hier_packed", "after", "hierarchical", packed=True),
    )
}
"""By name. ``paper`` is the baseline of the Parm paper, ``deepspeed`` the order of DeepSpeed since 0.7.1."""


def schedule_named(label: str) -> Schedule:
    """Return the schedule of a label: a name, or a name and chunks, ``s1_hier/4``.

    Raises:
        ValueError: there is none of that name, or it cannot be cut like that.
    """
    name, _, chunks = label.partition("/")
    if name not in SCHEDULES or (chunks and not chunks.isdecimal()):
        raise ValueError(
            f"There is no schedule {label!r}: choose one of {', '.join(SCHEDULES)}, with '/N' behind it for N chunks."
        )
    return SCHEDULES[name].with_chunks(int(chunks)) if chunks else SCHEDULES[name]
