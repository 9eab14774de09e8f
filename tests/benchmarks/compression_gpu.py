"""What compressing costs on a GPU: time, synchronisations and memory on the gradients of two published models.

    python -m tests.benchmarks.compression_gpu                 # needs a CUDA device; about two minutes
    python -m tests.benchmarks.compression_gpu --device cpu    # the same steps on the CPU, to see that the script runs

The model is a bag of parameters of the published shapes whose backward costs next to nothing, so a step is the hook:
compression, orthogonalisation, one-rank collectives and decompression. Every method runs in turn, five times over, in
one process; medians over steps. torch's `powerSGD_hook` is the peer; it hangs over gloo, so it is left out on the CPU.
Synchronisations are counted by torch's own profiler.
"""

import argparse
import datetime
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from lightning_efficient.compression import ACPSGD, PowerSGD, register_compressor
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.published_models import PUBLISHED
from tests.benchmarks.timing import timed

OUT = Path(__file__).parents[2] / "docs" / "benchmarks"
SYNCHRONISATIONS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


class Bag(nn.Module):
    """Parameters of the given shapes; their gradients are fixed random tensors."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)
        self.targets = [torch.randn(shape) for shape in shapes]

    def place(self, device: torch.device) -> "Bag":
        """Move parameters and targets."""
        self.targets = [target.to(device) for target in self.targets]
        return self.to(device)

    def forward(self) -> Tensor:
        return torch.stack([(w * t).sum() for w, t in zip(self.weights, self.targets, strict=True)]).sum()


def acp(rank: int, **options: Any) -> Callable[[DistributedDataParallel], object]:
    return lambda ddp: register_compressor(ddp, ACPSGD(rank, **options))


def power(rank: int) -> Callable[[DistributedDataParallel], object]:
    return lambda ddp: register_compressor(ddp, PowerSGD(rank))


def torch_power(rank: int) -> Callable[[DistributedDataParallel], object]:
    def install(ddp: DistributedDataParallel) -> None:
        state = powerSGD_hook.PowerSGDState(None, rank, start_powerSGD_iter=2)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    return install


def methods(rank: int, device: torch.device) -> dict[str, Callable[[DistributedDataParallel], object]]:
    table = {
        "plain DDP": lambda ddp: None,
        "ACP-SGD, qr": acp(rank),
        "ACP-SGD, cholesky": acp(rank, orthogonalization="cholesky"),
        "Power-SGD (ours)": power(rank),
    }
    if device.type == "cuda":
        table["torch powerSGD_hook"] = torch_power(rank)
    return table


def measure(model: str, rank: int, device: torch.device, steps: int) -> list[dict[str, Any]]:
    """One row per method."""
    steppers, rows = {}, []
    for name, install in methods(rank, device).items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        ddp = DistributedDataParallel(Bag(list(PUBLISHED[model]().shapes)).place(device))
        install(ddp)

        def step(ddp: DistributedDataParallel = ddp) -> None:
            ddp.zero_grad(set_to_none=True)
            ddp().backward()

        for _ in range(5):
            step()
        steppers[name] = step
        row: dict[str, Any] = {"model": model, "rank": rank, "method": name}
        if device.type == "cuda":
            gradients = sum(p.numel() * p.element_size() for p in ddp.parameters())
            row["peak_gradients"] = (torch.cuda.max_memory_allocated() - before) / gradients
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                step()
            counts = {event.key: event.count for event in profiler.key_averages()}
            row["synchronisations"] = sum(counts.get(name, 0) for name in SYNCHRONISATIONS)
        rows.append(row)
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(steps):
        for name, step in steppers.items():
            times[name].append(timed(step, device))
    plain = statistics.median(times["plain DDP"])
    for row in rows:
        row["ms"] = statistics.median(times[row["method"]])
        row["ms_over_plain"] = row["ms"] - plain
    return rows


def page(rows: list[dict[str, Any]], command: str, device: torch.device) -> str:
    columns = list(rows[0])
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    lines = [
        "# Compression on a GPU",
        "",
        "One rank; the step is the hook. `peak_gradients`: peak memory in gradient sizes, including what the model "
        "itself holds (parameters, buckets, targets). `synchronisations`: host waits per step, from the profiler.",
        "",
        f"Command: `{command}`",
        "",
        f"Device: {name}. Machine: {describe_machine()}. Date: {datetime.date.today().isoformat()}",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    for row in rows:
        cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the page when a GPU was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default cuda")
    parser.add_argument("--models", nargs="*", default=["ResNet-152", "BERT-Large"], choices=sorted(PUBLISHED))
    parser.add_argument("--ranks", nargs="*", type=int, default=[4, 32], help="default 4 32")
    parser.add_argument("--steps", type=int, default=30, help="timed steps per method (default 30)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: run this on a machine with a GPU, or pass --device cpu to see that it runs.")
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    warnings.filterwarnings("ignore", message="gradient compression has no effect")
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        rows = [row for model in args.models for rank in args.ranks for row in measure(model, rank, device, args.steps)]
        dist.destroy_process_group()
    text = page(rows, "python -m tests.benchmarks.compression_gpu", device)
    print(text)
    if device.type == "cuda":
        stem = "compression_gpu_" + torch.cuda.get_device_name().replace(" ", "_").lower()
        (OUT / f"{stem}.md").write_text(text)
        (OUT / f"{stem}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
