"""A lab's namespaces carry its owner in their names, so that a later run can tell which labs nobody owns any more."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

KEPT = "netlab-kept-"


@dataclass(frozen=True, slots=True)
class LabName:
    """What the name of a namespace says.

    Attributes:
        name: Of the lab: the namespace's without the host.
        kept: The lab was made to stay after its maker.
        pid: Its owner, 0 if kept.
        started: When the owner started, in clock ticks since boot: process ids are used again.
    """

    name: str
    kept: bool
    pid: int
    started: int

    def owner_alive(self) -> bool:
        return _started(self.pid) == self.started


def owned_name(number: int) -> str:
    """The name of this process's lab number `number`."""
    return f"netlab-{os.getpid()}-{_started(os.getpid())}-{number}"


def parse(namespace: str) -> LabName | None:
    """Read the name of a namespace; None if it is no lab's."""
    if kept := re.fullmatch(rf"({KEPT}\d+-\d+)-(h\d+|switch)", namespace):
        return LabName(kept[1], True, 0, 0)
    if owned := re.fullmatch(r"(netlab-(\d+)-(\d+)-\d+)-(h\d+|switch)", namespace):
        return LabName(owned[1], False, int(owned[2]), int(owned[3]))
    return None


def _started(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rsplit(")", 1)[1].split()  # the command before it may hold spaces
    state, start = fields[0], int(fields[19])
    return None if state in "ZX" else start
