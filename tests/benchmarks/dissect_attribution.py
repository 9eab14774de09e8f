"""How much of backward is told by module: by the recorder of Dissect, and by Lightning's PyTorchProfiler.

python -m tests.benchmarks.dissect_attribution             # about a minute on one core
"""

import argparse
import datetime
import json
import logging
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import PyTorchProfiler
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_efficient.dissect import Breakdown
from lightning_efficient.dissect.attribution import BUCKETS, ENGINE, GRAD_ACCUMULATE, TRAINING_STEP, UNATTRIBUTED
from tests.benchmarks.machine import describe_machine
from tests.dissect.models import CASES, Case, llama
from tests.dissect.steps import record, rows
from tests.support.ranks import run_ranks
from tests.support.trainers import make_trainer

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "dissect_attribution_2core_cpu_202611"
STEPS = 5
DDP_ROWS = 12
"""Of the batch of each rank: gradients are copied once a step, however many rows there are."""
_RANGE, _NODE = "[pl][module]", "autograd::engine::evaluate_function"
OTHERS = {
    TRAINING_STEP: "loss",
    GRAD_ACCUMULATE: "accumulation",
    BUCKETS: "DDP's copies",
    ENGINE: "engine",
    UNATTRIBUTED: "unattributed",
}


@dataclass(frozen=True)
class Shares:
    """Of the backward time of a setting.

    Attributes:
        setting: model and how it trains.
        backward_ms: of a profiled step.
        modules: share in rows of modules.
        others: shares of what is left, by what it is.
        lightning: see `lightnings_share`; None where it was not run.
        closed: all rows over the step.
    """

    setting: str
    backward_ms: float
    modules: float
    others: dict[str, float]
    lightning: tuple[float, float] | None
    closed: float


class Wrapped(pl.LightningModule):
    """The model of a case, trained by Lightning."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.model = case, case.model

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.case.loss(self.model)

    @override
    def configure_optimizers(self) -> Any:
        return SGD([each for each in self.parameters() if each.requires_grad], lr=1e-3)


def shares(setting: str, host: Breakdown, lightning: tuple[float, float] | None) -> Shares:
    whole, cut = host.phase_s("backward"), rows(host)
    return Shares(
        setting,
        1e3 * whole,
        host.backward_attributed,
        {name: cut[row].backward_s / whole for row, name in OTHERS.items() if row in cut},
        lightning,
        sum(row.total_s for row in host.rows) / host.step_s,
    )


def lightnings_share(case: Case) -> tuple[float, float]:
    """What Lightning's profiler tells of backward, as shares of the time of its nodes.

    Returns:
        The nodes in a range of the module that made them, and those in a range of any module: ranges of a
        recomputation that stops early stay open, around nodes of other modules.
    """
    with tempfile.TemporaryDirectory() as folder:
        profiler = PyTorchProfiler(dirpath=folder, filename="torch", record_module_names=True, export_to_chrome=False)
        batches: Any = DataLoader(torch.zeros(6, 1), batch_size=1)  # type: ignore[arg-type]
        make_trainer(1, precision=32, profiler=profiler, max_epochs=1).fit(Wrapped(case), batches)
    events = sorted(profiler.function_events or [], key=lambda each: (each.time_range.start, -each.time_range.end))
    maker: dict[int, str] = {}
    right = wrong = whole = 0.0
    open_: list[Any] = []  # ranges of modules and nodes, outermost first
    for event in events:
        # What stayed open outlasts what encloses it.
        open_ = [each for each in open_ if each.time_range.end > event.time_range.start]
        module = next((each.name for each in reversed(open_) if each.name.startswith(_RANGE)), "")
        in_a_node = any(each.name.startswith(_NODE) for each in open_)
        if event.name.startswith(_NODE):
            if not in_a_node:
                took = event.time_range.elapsed_us()
                whole += took
                right += took * bool(module and module == maker.get(event.sequence_nr))
                wrong += took * bool(module and module != maker.get(event.sequence_nr))
            open_.append(event)
        elif event.name.startswith(_RANGE):
            open_.append(event)
        elif event.sequence_nr >= 0 and not in_a_node:
            maker[event.sequence_nr] = module
    if not any(event.name.startswith(_RANGE) for event in events):
        raise RuntimeError("Lightning's profiler recorded no module.")
    return right / whole, wrong / whole


def on_a_rank(rank: int, world_size: int) -> Breakdown:
    torch.manual_seed(0)
    case = llama(DDP_ROWS)
    model = DistributedDataParallel(case.model)
    return record(model, case.loss, warmup=2, steps=STEPS, watched=case.model).host


def measure() -> list[Shares]:
    """All settings."""
    found = []
    for name, make in CASES.items():
        torch.manual_seed(0)
        case = make()
        host = record(case.model, case.loss, steps=STEPS).host
        found.append(shares(name, host, lightnings_share(make())))
    for rank, host in enumerate(run_ranks(on_a_rank, 2, timeout=120)):
        found.append(shares(f"Llama, {DDP_ROWS} rows, DDP, rank {rank} of 2", host, None))
    return found


def report(found: list[Shares], command: str) -> str:
    """The page."""
    names = list(OTHERS.values())
    lines = [
        "# How much of backward is told by module",
        "",
        f"Command: `{command}`",
        "",
        f"Machine: {describe_machine()}, one thread. Date: {datetime.date.today().isoformat()}",
        "",
        f"Shares of the backward time of {STEPS} profiled steps, by the training thread's clock; what waits for a "
        "collective is communication, and not in them. *Loss* is computed outside of modules, *accumulation* adds "
        "gradients to parameters, the *engine* is its start and its end. *Lightning*: the part of backward that lies "
        "in a range of the module that made it with `PyTorchProfiler(record_module_names=True)`, in a training of its "
        "own; and the part in a range of another module, as ranges stay open where recomputation stops early. "
        "*Rows / step*: all rows of the table, over the step.",
        "",
        f"| setting | backward, ms | in modules | {' | '.join(names)} | Lightning | Lightning, wrong | rows / step |",
        f"|---|---|---|{'---|' * len(names)}---|---|---|",
    ]
    for each in found:
        others = " | ".join(f"{100 * each.others.get(name, 0.0):.2f} %" for name in names)
        told = ["", ""] if each.lightning is None else [f"{100 * share:.2f} %" for share in each.lightning]
        lines.append(
            f"| {each.setting} | {each.backward_ms:.1f} | {100 * each.modules:.2f} % | {others} | {' | '.join(told)} "
            f"| {each.closed:.6f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the Markdown and JSON files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="path of the results without suffix")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = measure()
    text = report(found, "python -m tests.benchmarks.dissect_attribution")
    print(text)
    args.out.with_suffix(".md").write_text(text)
    args.out.with_suffix(".json").write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
