"""Puts the report of a dissected fit together, over all ranks, and writes it."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_efficient.callbacks.dissect_parts import Counted, MeasurementParts
from lightning_efficient.dissect import (
    Breakdown,
    DissectReport,
    Flops,
    Machine,
    Memory,
    Throughput,
    Window,
    find_straggler,
    rank_times,
    write_json,
)
from lightning_efficient.dissect.attribution import TRAINING_STEP
from lightning_efficient.dissect.memory import StateBytes, state_bytes
from lightning_efficient.dissect.peaks import peak_flops as known_peak
from lightning_efficient.dissect.report.dissection import dissection_sections
from lightning_efficient.dissect.report.html import page
from lightning_efficient.dissect.result import PHASES

ValueT = TypeVar("ValueT")
_NAMED = 3
_SAME_SIZE = 0.01
_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}


def build_report(
    parts: MeasurementParts,
    trainer: pl.Trainer,
    module: pl.LightningModule,
    *,
    peak_flops: float | None,
    loss: float | None,
) -> DissectReport:
    """Put the report together; all ranks call it at the same step, and get the same but for their own rows.

    Args:
        parts: of the measurement, all done.
        trainer: runs the fit.
        module: what is trained.
        peak_flops: of one device, where the user gave it.
        loss: of the last step.
    """
    throughput = parts.clean.window.finish(_sum_over_ranks)
    attribution = parts.dissected.result()
    host = _with_counts(attribution.host, parts.counted) if attribution else None
    device = _with_counts(attribution.device, parts.counted) if attribution and attribution.device else None
    flops = parts.counted.flops
    own = _OfOneRank(
        device or host,
        _memory(parts, state_bytes(module, trainer.optimizers)),
        None
        if flops is None
        else _FlopsOfOneRank(flops.model_flops, flops.hardware_flops, _size(parts), tuple(sorted(flops.uncounted))),
    )
    every = _gather(own)
    breakdowns = [each.breakdown for each in every if each.breakdown is not None]
    machine = _machine(trainer, module)
    return DissectReport(
        machine=machine,
        window=Window(*(part.steps for part in parts)),
        throughput=throughput,
        flops=_flops(every, trainer, machine, throughput, given=peak_flops, why_not=_why_uncounted(parts.counted)),
        memory=_largest([each.memory for each in every]),
        host=host,
        device=device,
        collectives=attribution.collectives if attribution else (),
        operators=attribution.operators if attribution else (),
        ranks=tuple(rank_times(rank, each) for rank, each in enumerate(breakdowns)),
        straggler=find_straggler(breakdowns),
        loss=loss,
        notes=tuple(_notes(parts)),
    )


def write_report(report: DissectReport, folder: Path) -> None:
    """Write ``dissect.json`` and ``dissect.html``."""
    write_json(report, folder / "dissect.json")
    html = page("Where a step goes", [], dissection_sections(report))
    (folder / "dissect.html").write_text(html, encoding="utf-8")
    rank_zero_info(f"Dissect wrote {folder / 'dissect.json'} and {folder / 'dissect.html'}.")


def measured_values(report: DissectReport) -> dict[str, float]:
    """The report's main numbers by the names under which they are logged; times in milliseconds, sizes in MiB."""
    throughput, memory, flops = report.throughput, report.memory, report.flops
    values: dict[str, float | None] = {
        "dissect/step_ms": 1e3 * throughput.step_s.p50,
        "dissect/wait_ms": 1e3 * throughput.wait_s.p50,
        "dissect/tokens_per_s": throughput.tokens_per_s,
        "dissect/samples_per_s": throughput.samples_per_s,
        "dissect/mfu": flops.mfu,
        "dissect/hfu": flops.hfu,
        "dissect/peak_mib": _mib(memory.peak_bytes),
        "dissect/saved_mib": _mib(memory.saved_bytes),
    }
    if (cut := report.device or report.host) is not None:
        values |= {f"dissect/{phase}_ms": 1e3 * cut.phase_s(phase) for phase in PHASES}
    return {name: value for name, value in values.items() if value is not None}


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


class _FlopsOfOneRank(NamedTuple):
    """Of the counted step, its size as a multiple of a clean one's, and the operators that were not counted."""

    model: int
    hardware: int
    size: float
    uncounted: tuple[str, ...]


class _OfOneRank(NamedTuple):
    """What a rank tells the others."""

    breakdown: Breakdown | None
    memory: Memory
    flops: _FlopsOfOneRank | None


def _size(parts: MeasurementParts) -> float:
    """How much more than a clean step the counted one had to do: by padded tokens, else samples, else batches."""
    clean, counted = parts.clean.window, parts.counted.counts
    for size in (lambda each: float(each.padded_tokens), lambda each: float(each.samples), lambda each: 1.0):
        own, mean = sum(map(size, counted)), sum(map(size, clean.counts)) / clean.done
        if own and mean:
            return own / mean
    return 1.0


def _with_counts(breakdown: Breakdown, counted: Counted) -> Breakdown:
    """The rows with what was counted of them; what no row's module kept is the training step's."""
    flops = counted.flops.by_module() if counted.flops is not None else {}
    saved = dict(counted.saved) if counted.saved_total is not None else None
    rows = []
    for row in breakdown.rows:
        if row.is_module:
            own = flops.get(row.name)
            row = replace(
                row,
                saved_bytes=saved.pop(row.name, 0) if saved is not None else None,
                flops=own.forward + own.recompute + own.backward if own is not None else None,
            )
        rows.append(row)
    if saved:
        rest = sum(saved.values())
        rows = [replace(row, saved_bytes=rest) if row.name == TRAINING_STEP else row for row in rows]
    return replace(breakdown, rows=tuple(rows))


def _memory(parts: MeasurementParts, state: StateBytes) -> Memory:
    peak, reserved = parts.clean.peak_bytes
    why_not = [parts.clean.peak_unknown, "" if parts.counted.saved_total is not None else _why_uncounted(parts.counted)]
    return Memory(
        peak_bytes=peak,
        peak_reserved_bytes=reserved,
        parameter_bytes=state.parameter_bytes,
        gradient_bytes=state.gradient_bytes,
        optimizer_bytes=state.optimizer_bytes,
        saved_bytes=parts.counted.saved_total,
        note="; ".join(each for each in why_not if each),
    )


def _flops(
    every: Sequence[_OfOneRank],
    trainer: pl.Trainer,
    machine: Machine,
    throughput: Throughput,
    *,
    given: float | None,
    why_not: str,
) -> Flops:
    counted = [each.flops for each in every if each.flops is not None]
    if not counted:
        return Flops(note=why_not)
    model, hardware = sum(each.model for each in counted), sum(each.hardware for each in counted)
    notes = []
    if uncounted := sorted({name for each in counted for name in each.uncounted}):
        notes.append(f"not counted, for no formula is known: {_some(uncounted)}")
    size = statistics.fmean(each.size for each in counted)
    if abs(size - 1) > _SAME_SIZE:
        notes.append(f"they are of a step {size:.2f} times the size of a clean one: MFU and HFU take that into account")
    dtype = _compute_dtype(trainer)
    known = None if dtype is None else known_peak(machine.device, dtype, tf32=_uses_tf32())
    peak = given if given is not None else known
    if peak is None:
        what = f"{machine.device} in {dtype or f'precision {trainer.precision}'}"
        notes.append(f"no peak is known for {what}: give peak_flops for MFU")
        return Flops(model, hardware, note="; ".join(notes))
    possible = throughput.step_s.mean * peak * trainer.world_size
    return Flops(
        model,
        hardware,
        peak,
        mfu=sum(each.model / each.size for each in counted) / possible,
        hfu=sum(each.hardware / each.size for each in counted) / possible,
        note="; ".join(notes),
    )


def _compute_dtype(trainer: pl.Trainer) -> torch.dtype | None:
    """The type in which the precision plugin computes; None where it does not say."""
    dtype = getattr(trainer.precision_plugin, "dtype", None)  # bitsandbytes calls itself 32-true
    if isinstance(dtype, torch.dtype):
        return dtype
    return _DTYPES.get(str(trainer.precision).split("-")[0])


def _uses_tf32() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


def _why_uncounted(counted: Counted) -> str:
    if counted.compiled:
        return "the model is compiled: counting would compile it anew, and change what runs"
    if not counted.steps:
        return "no step was asked for to count them (memory=0)"
    return "" if counted.done else "the fit ended before the step that counts them"


def _notes(parts: MeasurementParts) -> list[str]:
    notes = []
    dissected, counted, ranges = parts.dissected, parts.counted, parts.dissected.recorder.ranges
    if counted.steps and (counted.compiled or not counted.done):
        notes.append(f"FLOPs and saved bytes were not counted: {_why_uncounted(counted)}.")
    if dissected.done < dissected.steps:
        notes.append(f"The fit ended after {dissected.done} of {dissected.steps} dissected steps.")
    if counted.interrupted:
        notes.append("What torch.func's transforms kept for backward is not in the saved bytes: they let nobody look.")
    if ranges.compiled:
        notes.append(f"Compiled modules are one row each: {_some(ranges.compiled)}.")
    if ranges.scripted:
        notes.append(f"TorchScript modules take no hooks and have no row: {_some(ranges.scripted)}.")
    return notes


def _some(names: Sequence[str]) -> str:
    more = " and more" if len(names) > _NAMED else ""
    return ", ".join(name or "the whole model" for name in names[:_NAMED]) + more


def _sum_over_ranks(values: Sequence[float]) -> tuple[list[float], float]:
    """Sum all values but the last over the ranks; of the last, the largest."""
    *counts, seconds = zip(*_gather(list(values)), strict=True)
    return [sum(each) for each in counts], max(seconds)


def _machine(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Machine:
    on_cuda = pl_module.device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(pl_module.device) if on_cuda else _processor(),
        accelerator=pl_module.device.type,
        world_size=trainer.world_size,
        strategy=type(trainer.strategy).__name__,
        precision=str(trainer.precision),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        lightning=pl.__version__,
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gather(own: ValueT) -> list[ValueT]:
    """What every rank has, in their order."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [own]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every


def _largest(every: Sequence[Memory]) -> Memory:
    """Each number as the rank has it that has most."""

    def most(name: str) -> Any:
        values = [getattr(each, name) for each in every]
        return max((value for value in values if value is not None), default=None)

    names = ("peak_bytes", "peak_reserved_bytes", "parameter_bytes", "gradient_bytes", "optimizer_bytes", "saved_bytes")
    return replace(every[0], **{name: most(name) for name in names})
