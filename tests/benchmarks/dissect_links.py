"""Whether lines fitted to collectives predict what a training step spends on a slow link.

    python -m tests.benchmarks.dissect_links            # needs root and iproute2; a minute

Two hosts that netlab joins by links of a set rate sweep all-reduces, fit latency and rate, and train a stack of linears
with DDP. Predicted: the sum over the step's buckets. Measured: the time in which one all-reduce or more is in flight,
median of the steps.
"""

import argparse
import datetime
import json
import statistics
from pathlib import Path

from lightning_efficient.dissect import to_json
from tests.benchmarks._dissect_link_rank import BUCKET_MIB, LAYERS, STEPS, WIDTH, Prediction, predict_and_measure
from tests.benchmarks.machine import describe_machine
from tests.netlab import Lab

OUT = Path(__file__).parents[2] / "docs" / "benchmarks"
NAME = "dissect_links_2core_cpu_202611"
TARGET = 0.15


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the page and the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"], help="default: 1gbit 100mbit")
    parser.add_argument("--rounds", type=int, default=3, help="of the whole measurement (default: 3)")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    rounds = []
    for number in range(options.rounds):
        with Lab(2) as lab:
            rounds.append(lab.run_ranks(predict_and_measure, lab.links, options.rates, timeout=300)[0])
        print(f"round {number + 1} of {options.rounds}:", *(f"{each.rate} {each.error:+.1%}" for each in rounds[-1]))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{NAME}.md").write_text(_page(rounds), encoding="utf-8")
    raw = [[to_json(each) for each in each_round] for each_round in rounds]
    (options.out / f"{NAME}.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    return 0


def _page(rounds: list[list[Prediction]]) -> str:
    rows = [
        f"| {number} | {each.rate} | {1e6 * each.fit.fits['all_reduce'].alpha_s:.0f} µs "
        f"| {8e-6 / each.fit.fits['all_reduce'].beta_s_per_byte:.0f} Mbit/s | {1e3 * each.predicted_s:.1f} ms "
        f"| {1e3 * statistics.median(each.measured_s):.1f} ms | {each.error:+.1%} |"
        for number, predictions in enumerate(rounds, start=1)
        for each in predictions
    ]
    worst = max(abs(each.error) for predictions in rounds for each in predictions)
    return "\n".join(
        [
            "# Predicted and measured communication of a step",
            "",
            f"Two hosts, gloo, DDP on {LAYERS} linears of width {WIDTH} in buckets of {BUCKET_MIB} MiB; {STEPS} steps. "
            "Predicted: latency and rate, fitted to all-reduces of 64 KiB to 4 MiB, applied to the step's buckets one "
            "after the other. Measured: the time in which one all-reduce or more is in flight, by the profiler. gloo "
            "runs two buckets at once over the same link, so that their times overlap and the sum of single times "
            "would count the link twice. An all-reduce of two ranks sends its size once in each direction.",
            "",
            "| round | link | latency | rate | predicted | measured | error |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Largest error {worst:.1%}; the target is {TARGET:.0%}.",
            "",
            f"Command: `python -m tests.benchmarks.dissect_links`. {describe_machine()}, "
            f"{datetime.date.today():%Y-%m-%d}.",
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
