"""What a dissection says: frozen values that go to JSON and come back unchanged.

Every duration is in seconds, every size in bytes, per optimizer step of one rank unless the name says otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

SCHEMA = 1
"""Number of the layout below; a file of another number is refused."""

ValueT = TypeVar("ValueT")
Phase = Literal["forward", "recompute", "backward", "optimizer", "data", "communication", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Status = Literal["ok", "oom", "diverged", "failed", "timeout", "skipped"]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A sample of durations in seconds; quantiles by linear interpolation.

    Attributes:
        count: size of the sample.
        p50: median.
        p90: 90th percentile.
        mean: arithmetic mean.
        std: standard deviation of the sample, 0 for a single value.
        p99: 99th percentile, only from 100 values on.
    """

    count: int
    p50: float
    p90: float
    mean: float
    std: float
    p99: float | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """Optimizer steps of each part of a measurement, in their order."""

    warmup: int = 5
    clean: int = 20
    dissect: int = 2
    memory: int = 1


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it ran.

    Attributes:
        device: the processor's or GPU's name.
        accelerator: ``cpu`` or ``cuda``.
        world_size: ranks over all nodes.
        strategy: class of the Lightning strategy.
        precision: Lightning's word for it, such as ``bf16-mixed``.
        threads: of intra-op parallelism, per rank.
        torch: version.
        lightning: version.
    """

    device: str
    accelerator: str
    world_size: int
    strategy: str
    precision: str
    threads: int
    torch: str
    lightning: str


@dataclass(frozen=True, slots=True)
class Throughput:
    """From the clean steps alone: no hook and no profiler is on.

    Attributes:
        step_s: an optimizer step, from the start of its first batch to the start of the next step's.
        micro_batch_s: a batch, from start to start.
        wait_s: from the end of a batch to the start of the next one: loading, moving it, and the loop itself.
        micro_batches_per_step: batches per optimizer step.
        tokens_per_s: tokens that are scored, or entries of the first integer tensor, over all ranks.
        padded_tokens_per_s: entries of the first integer tensor over all ranks, padding included.
        samples_per_s: rows of the batches, over all ranks.
    """

    step_s: Quantiles
    micro_batch_s: Quantiles
    wait_s: Quantiles
    micro_batches_per_step: float
    tokens_per_s: float | None = None
    padded_tokens_per_s: float | None = None
    samples_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations of a step, over all ranks, and the share of the peak that the clean steps reached.

    Attributes:
        model_per_step: without what checkpointing computes twice; None where it could not be counted.
        hardware_per_step: all that ran.
        peak_per_s: dense peak of one device at the precision in use; None for an unknown device.
        mfu: model FLOPs over step time, peak and devices; None without a peak. Where the counted step was of another
            size than the clean ones, in padded tokens, else samples, else batches, for a step of theirs.
        hfu: hardware FLOPs likewise.
        note: why something is None, and what was not counted.
    """

    model_per_step: int | None = None
    hardware_per_step: int | None = None
    peak_per_s: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank, the largest over the ranks.

    Attributes:
        peak_bytes: most that was allocated in the clean steps (CUDA), or resident (CPU).
        peak_reserved_bytes: most that CUDA's caching allocator held.
        parameter_bytes: parameters and buffers.
        gradient_bytes: gradients after the last backward.
        optimizer_bytes: the optimizers' state.
        saved_bytes: kept by a forward pass for backward, without parameters and buffers; None if not measured.
        note: why something is None.
    """

    peak_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    parameter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    saved_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A part of the step: a module without its children, or something beside the modules, then ``<in brackets>``.

    Attributes:
        name: path of the module, without wrappers such as DDP's.
        role: what it is in the model, such as ``mlp``; see :func:`lightning_efficient.dissect.role_of`.
        cls: class of the module.
        calls: forward calls in a step, recomputation left out.
        forward_s: time of its own operations in the forward pass.
        recompute_s: in the forward pass that checkpointing repeats.
        backward_s: in backward.
        optimizer_s: in the optimizer.
        data_s: waiting for data.
        communication_s: of exposed communication.
        other_s: anything else.
        saved_bytes: kept for backward by its own operations.
        flops: of its own operations, forward, recomputation and backward.
    """

    name: str
    role: str = "other"
    cls: str = ""
    calls: float = 0.0
    forward_s: float = 0.0
    recompute_s: float = 0.0
    backward_s: float = 0.0
    optimizer_s: float = 0.0
    data_s: float = 0.0
    communication_s: float = 0.0
    other_s: float = 0.0
    saved_bytes: int | None = None
    flops: int | None = None

    @property
    def total_s(self) -> float:
        """All of the row's time."""
        return sum(float(getattr(self, f"{phase}_s")) for phase in PHASES)

    @property
    def is_module(self) -> bool:
        """Whether the row is a module."""
        return not self.name.startswith("<")


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The dissected steps of one rank, cut into rows whose times add up to the step.

    Attributes:
        clock: ``host`` for the time of the training thread, ``device`` for the time of the GPU.
        step_s: mean duration of a dissected step; profiled, hence longer than a clean one.
        rows: the parts, in the order of the model, then those beside it.
    """

    clock: Literal["host", "device"]
    step_s: float
    rows: tuple[Row, ...]

    def phase_s(self, phase: Phase) -> float:
        """Return the time of one phase over all rows."""
        return sum(float(getattr(row, f"{phase}_s")) for row in self.rows)

    @property
    def backward_attributed(self) -> float:
        """Share of the backward time that lies in rows of modules; 0 without backward."""
        total = self.phase_s("backward")
        return sum(row.backward_s for row in self.rows if row.is_module) / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Collective:
    """Collectives of one kind and size in a step.

    Attributes:
        op: such as ``all_reduce``.
        n_bytes: of the tensors that this rank hands in.
        calls: per step.
        seconds: of one call, mean.
    """

    op: str
    n_bytes: int
    calls: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator over a step: its own time, without that of the operators it calls.

    Attributes:
        name: such as ``aten::addmm``.
        kind: such as ``gemm``; see :func:`lightning_efficient.dissect.kind_of`.
        calls: per step.
        seconds: per step.
    """

    name: str
    kind: str
    calls: float
    seconds: float


@dataclass(frozen=True, slots=True)
class RankTimes:
    """The phases of a dissected step on one rank, in seconds; exposed communication includes waiting for others."""

    rank: int
    step_s: float
    forward_s: float
    recompute_s: float
    backward_s: float
    optimizer_s: float
    data_s: float
    communication_s: float
    other_s: float

    @property
    def busy_s(self) -> float:
        """The step without exposed communication: what this rank needs by itself."""
        return self.step_s - self.communication_s


@dataclass(frozen=True, slots=True)
class Straggler:
    """The rank that the others wait for.

    Attributes:
        rank: its number.
        behind_s: by how much its busy time exceeds the median of the other ranks.
        row: the row in which it loses most against the median.
        row_behind_s: by how much.
    """

    rank: int
    behind_s: float
    row: str
    row_behind_s: float


@dataclass(frozen=True, slots=True)
class DissectReport:
    """Everything that :class:`lightning_efficient.callbacks.Dissect` found out.

    Attributes:
        machine: where it ran.
        window: how many steps were used for what.
        throughput: of the clean steps.
        flops: counted, and as shares of the peak.
        memory: peaks and parts.
        host: the dissected steps by the training thread's clock; None where nothing was dissected.
        device: by the GPU's; None without one.
        collectives: by kind and size.
        operators: most expensive first.
        ranks: phases of every rank.
        straggler: the rank that others wait for, if one stands out.
        loss: of the last step measured; None where the step returned none.
        notes: what could not be measured, and why.
        schema: number of this layout.
    """

    machine: Machine
    window: Window
    throughput: Throughput
    flops: Flops = field(default_factory=Flops)
    memory: Memory = field(default_factory=Memory)
    host: Breakdown | None = None
    device: Breakdown | None = None
    collectives: tuple[Collective, ...] = ()
    operators: tuple[Operator, ...] = ()
    ranks: tuple[RankTimes, ...] = ()
    straggler: Straggler | None = None
    loss: float | None = None
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case of a sweep.

    Attributes:
        case_id: unique in the sweep, such as ``tiny/F+R/seq128/mb4/world2``.
        axes: the point of the matrix: ``model``, ``technique``, ``seq``, ``micro_batch``, ``world``.
        status: how it ended.
        reason: one sentence why it is not ``ok``; empty if it is.
        wall_s: seconds that the case took, start of its process included.
        report: what was measured; only with ``ok``.
        schema: number of this layout.
    """

    case_id: str
    axes: Mapping[str, str | int]
    status: Status
    reason: str = ""
    wall_s: float = 0.0
    report: DissectReport | None = None
    schema: int = SCHEMA


def to_json(value: Any) -> dict[str, Any]:
    """Return a result as plain dicts, lists, numbers and strings; "nan" and "inf" are strings, as JSON has none."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(value))
    return plain


def from_json(cls: type[ValueT], data: Mapping[str, Any]) -> ValueT:
    """Return what :func:`to_json` made plain.

    Args:
        cls: :class:`DissectReport` or :class:`CaseResult`, or another class of this file.
        data: the plain values.

    Raises:
        ValueError: the data has another schema, or lacks or exceeds the fields of ``cls``.
    """
    if data.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(
            f"The result has schema {data['schema']}, this version reads {SCHEMA}: it was written by another version "
            "of lightning-efficient. Measure again, or read it with that version."
        )
    try:
        built: ValueT = _build(cls, data)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"This is no {cls.__name__} ({error}). Give a file that lightning-efficient wrote.") from error
    return built


def write_json(value: Any, path: str | Path) -> None:
    """Write a result to a file, whole or not at all; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(to_json(value), indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read_json(cls: type[ValueT], path: str | Path) -> ValueT:
    """Read what :func:`write_json` wrote; raises what :func:`from_json` does, and ``FileNotFoundError``."""
    return from_json(cls, json.loads(Path(path).read_text(encoding="utf-8")))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _build(kind: Any, data: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _build(hints[name], value) for name, value in data.items()})  # type: ignore[operator]
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(data, str) and (kind is float or float in arguments):
        return float(data)
    if origin is tuple:
        return tuple(_build(arguments[0], each) for each in data)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: _build(arguments[1], each) for key, each in data.items()}
    if origin in (Union, types.UnionType) and data is not None:
        classes = [each for each in arguments if dataclasses.is_dataclass(each)]
        return _build(classes[0], data) if classes else data
    return data
