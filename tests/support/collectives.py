"""Count the collectives a process really issued, from Python or C++, on any thread.

Patching `torch.distributed.all_reduce` misses what DDP's C++ reducer sends. The gloo backend itself writes every
operation into torch's flight recorder, whoever asked for it, so that is what is read here. Ranks started by
`tests.support.ranks` have the recorder on; elsewhere set `TORCH_FR_BUFFER_SIZE` before the first collective.

    with count_collectives() as seen:
        ddp_model(x).sum().backward()
    assert [c.op for c in seen] == ["all_reduce"]
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch._C import _distributed_c10d as c10d

_ITEMSIZE = {
    "Byte": 1, "Char": 1, "Bool": 1, "Half": 2, "BFloat16": 2, "Short": 2, "Int": 4, "Float": 4, "Long": 8,
    "Double": 8, "ComplexFloat": 8, "ComplexDouble": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective as the backend saw it.

    Attributes:
        op: `all_reduce`, `all_gather`, `broadcast`, `barrier`, `reduce_scatter`, ...
        numel: Elements this rank put in, over all tensors of the call.
        dtype: In torch's C++ spelling (`Float`, `BFloat16`, `Byte`), "" if it has no input.
        nbytes: Bytes this rank put in.
        thread_id: Of the thread that issued it; compares with `threading.get_ident()`.
        time_ns: When it was issued; compares with `time.time_ns()`.
        group: Name of the process group.
    """

    op: str
    numel: int
    dtype: str
    nbytes: int
    thread_id: int
    time_ns: int
    group: str


@contextmanager
def count_collectives() -> Iterator[list[Collective]]:
    """Yield a list that holds, once the block is left, every collective issued inside it, in order.

    Raises:
        RuntimeError: If torch's flight recorder is off, or too small for the block.
    """
    _require_recorder()
    before = _last_id(_entries())
    seen: list[Collective] = []
    yield seen
    entries = [e for e in _entries() if e["record_id"] > before]
    if entries and entries[0]["record_id"] != before + 1:
        raise RuntimeError("Collectives were forgotten: the recorder is full. Raise TORCH_FR_BUFFER_SIZE.")
    seen.extend(_collective(e) for e in entries)


def _entries() -> list[dict[str, Any]]:
    dump: dict[str, Any] = json.loads(c10d._dump_fr_trace_json())  # type: ignore[attr-defined]
    return sorted(dump.get("entries", []), key=lambda e: int(e["record_id"]))


def _last_id(entries: list[dict[str, Any]]) -> int:
    return int(entries[-1]["record_id"]) if entries else -1


def _require_recorder() -> None:
    if int(os.environ.get("TORCH_FR_BUFFER_SIZE", "0")) < 1:
        raise RuntimeError(
            "Collectives cannot be counted: torch's flight recorder is off. "
            "Set TORCH_FR_BUFFER_SIZE before the first collective, or use tests.support.ranks."
        )


def _collective(entry: dict[str, Any]) -> Collective:
    sizes, dtypes = entry["input_sizes"], entry["input_dtypes"]
    numels = [math.prod(size) for size in sizes]
    return Collective(
        op=entry["profiling_name"].split(":", 1)[1],
        numel=sum(numels),
        dtype=dtypes[0] if dtypes else "",
        nbytes=sum(n * _ITEMSIZE[d] for n, d in zip(numels, dtypes, strict=True)),
        thread_id=int(entry["thread_id"]),
        time_ns=int(entry["time_created_ns"]),
        group=entry["process_group"][1],
    )
