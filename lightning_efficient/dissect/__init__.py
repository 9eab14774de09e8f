"""Where the time and the memory of a training step go, and what serving costs: plain torch, for any module."""

from lightning_efficient._saved_bytes import SavedBytes, saved_bytes
from lightning_efficient.dissect.attribution import Attribution, attribute
from lightning_efficient.dissect.collectives import (
    AlphaBeta,
    CollectivePoint,
    CommReport,
    bus_factor,
    fit,
    predict_step,
    sweep,
)
from lightning_efficient.dissect.events import Event, events_of
from lightning_efficient.dissect.flops import FlopCount, ModuleFlops
from lightning_efficient.dissect.memory import PeakMemory, StateBytes, state_bytes
from lightning_efficient.dissect.modelled import Cluster, ModelledStep, ModelSize, modelled_step
from lightning_efficient.dissect.operators import kind_of
from lightning_efficient.dissect.peaks import peak_flops
from lightning_efficient.dissect.predict import LiveBytes, MemoryPrediction, predict_memory
from lightning_efficient.dissect.ranges import ModuleRanges
from lightning_efficient.dissect.recorder import Recorder
from lightning_efficient.dissect.result import (
    Breakdown,
    CaseResult,
    Collective,
    DissectReport,
    Flops,
    Machine,
    Memory,
    Operator,
    Quantiles,
    RankTimes,
    Row,
    Straggler,
    Throughput,
    Window,
    from_json,
    read_json,
    to_json,
    write_json,
)
from lightning_efficient.dissect.roles import role_of
from lightning_efficient.dissect.stragglers import find_straggler, rank_times
from lightning_efficient.dissect.window import CleanWindow, Counts, count_batch, quantiles

__all__ = [
    "AlphaBeta",
    "Attribution",
    "Breakdown",
    "CaseResult",
    "CleanWindow",
    "Cluster",
    "Collective",
    "CollectivePoint",
    "CommReport",
    "Counts",
    "DissectReport",
    "Event",
    "FlopCount",
    "Flops",
    "LiveBytes",
    "Machine",
    "Memory",
    "MemoryPrediction",
    "ModelSize",
    "ModelledStep",
    "ModuleFlops",
    "ModuleRanges",
    "Operator",
    "PeakMemory",
    "Quantiles",
    "RankTimes",
    "Recorder",
    "Row",
    "SavedBytes",
    "StateBytes",
    "Straggler",
    "Throughput",
    "Window",
    "attribute",
    "bus_factor",
    "count_batch",
    "events_of",
    "find_straggler",
    "fit",
    "from_json",
    "kind_of",
    "modelled_step",
    "peak_flops",
    "predict_memory",
    "predict_step",
    "quantiles",
    "rank_times",
    "read_json",
    "role_of",
    "saved_bytes",
    "state_bytes",
    "sweep",
    "to_json",
    "write_json",
]
