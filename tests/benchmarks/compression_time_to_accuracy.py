"""How long digits take to reach 96 % test accuracy over a slow link: the figure a user cares about.

    python -m tests.benchmarks.compression_time_to_accuracy            # root; a few minutes
    python -m tests.benchmarks.compression_time_to_accuracy --quick    # one seed, two methods; prints, writes nothing

Four hosts (network namespaces) on links of 50 Mbit/s train a 64-256-256-10 perceptron on scikit-learn's digits: SGD
lr 0.05, momentum 0.9, global batch 128, the same for every method. Every ten steps all ranks stop the clock, rank 0
tests, and training ends at the target. Methods run in turn within each seed; medians over seeds.
"""

import argparse
import datetime
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import track

from tests.benchmarks import digits
from tests.benchmarks._links_methods import PLAIN, Method
from tests.benchmarks.machine import describe_machine
from tests.netlab import Lab

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "compression_time_to_accuracy_2core_cpu_202611"
METHODS = [PLAIN, "half", "torch_power_sgd:4", "power_sgd:4", "acp_sgd:4", "acp_sgd:8"]
TEST_EVERY = 10
GLOBAL_BATCH = 128


@dataclass(frozen=True, slots=True)
class Result:
    """One training: seconds and steps until the target, inf where it was not reached in `max_steps`."""

    method: str
    seed: int
    seconds: float
    steps: int
    accuracy: float


def train(rank: int, world_size: int, name: str, seed: int, target: float, max_steps: int) -> Result:
    """Train until the target; every rank returns the same result."""
    x_train, y_train, x_test, y_test = digits.load(seed)
    model = digits.perceptron(seed)
    ddp = Method.parse(name).wrap(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    batches: list[torch.Tensor] = []
    seconds, step, accuracy = 0.0, 0, 0.0
    dist.barrier()
    begun = time.perf_counter()
    while step < max_steps:
        if not batches:
            batches = list(torch.randperm(len(x_train), generator=order).split(GLOBAL_BATCH))[:-1]
        rows = batches.pop().chunk(world_size)[rank]
        optimizer.zero_grad()
        F.cross_entropy(ddp(x_train[rows]), y_train[rows]).backward()
        optimizer.step()
        step += 1
        if step % TEST_EVERY == 0:
            seconds += time.perf_counter() - begun
            accuracy = digits.accuracy(model, x_test, y_test)
            if accuracy >= target:  # the replicas are bit-identical, so every rank decides alike
                return Result(name, seed, seconds, step, accuracy)
            dist.barrier()
            begun = time.perf_counter()
    return Result(name, seed, math.inf, step, accuracy)


def page(results: list[Result], command: str, rate: str, target: float) -> str:
    """The table: medians over seeds."""
    lines = [
        f"# Time to {target:g} % on digits over {rate}",
        "",
        "Four hosts; 64-256-256-10 perceptron, SGD lr 0.05 momentum 0.9, global batch 128, nothing tuned per method; "
        "time excludes testing. Medians over seeds; the speed-up is the median of the ratios within a seed.",
        "",
        f"Command: `{command}`",
        "",
        f"Machine: {describe_machine()}. Date: {datetime.date.today().isoformat()}",
        "",
        "| method | seconds | steps | faster than plain DDP | reached |",
        "|---|---|---|---|---|",
    ]
    plain = {result.seed: result.seconds for result in results if result.method == PLAIN}
    for method in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == method]
        seconds = statistics.median(result.seconds for result in own)
        steps = statistics.median(result.steps for result in own)
        ratio = statistics.median(plain[result.seed] / result.seconds for result in own)
        reached = sum(math.isfinite(result.seconds) for result in own)
        lines.append(f"| {method} | {seconds:.2f} | {steps:g} | {ratio:.1f}x | {reached} of {len(own)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all trainings and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, plain DDP and acp_sgd:4; writes nothing")
    parser.add_argument("--rate", default="50mbit", help="of each host's link, as tc writes it (default 50mbit)")
    parser.add_argument("--target", type=float, default=96.0, help="test accuracy in %% (default 96)")
    parser.add_argument("--seeds", type=int, default=5, help="default 5")
    parser.add_argument("--max-steps", type=int, default=1000, help="give up after so many steps (default 1000)")
    args = parser.parse_args()
    methods = [PLAIN, "acp_sgd:4"] if args.quick else METHODS
    todo = [(name, seed) for seed in range(1 if args.quick else args.seeds) for name in methods]
    with Lab(4, rate=args.rate) as lab:
        results = [
            lab.run_ranks(train, name, seed, args.target, args.max_steps, timeout=600)[0]
            for name, seed in track(todo, description="training")
        ]
    command = (
        "python -m tests.benchmarks.compression_time_to_accuracy "
        f"--rate {args.rate} --target {args.target:g} --seeds {args.seeds}"
    )
    text = page(results, command, args.rate, args.target)
    print(text)
    if not args.quick:
        OUT.with_suffix(".md").write_text(text)
        OUT.with_suffix(".json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
