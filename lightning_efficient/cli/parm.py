"""`lightning-efficient parm plan`: which schedule a mixture-of-experts layer should run by, on these machines."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from lightning_efficient.cli.errors import CommandParser, UserError
from lightning_efficient.cli.ranks import run_on_ranks, settle_backend, settle_ranks
from lightning_efficient.moe import Capacity, MoELayer, MoESizes, MoETopology, parallelize
from lightning_efficient.moe.planning import (
    AutoSchedule,
    Choice,
    LayerShape,
    Plan,
    choice_table,
    explain,
    links_table,
)

_ACTIVATIONS = ("swiglu", "gelu", "relu")
_DTYPES = ("float32", "bfloat16", "float16")
_DESCRIPTION = """\
Measures the links between the ranks and the work of one mixture-of-experts layer, predicts forward and backward by
each schedule of Parm, runs those that may be the fastest, and says which one is. Starts its processes itself, or joins
those that torchrun started, on one machine or several. Nothing is trained.
"""
_EXAMPLES = """\
examples:
  lightning-efficient parm plan --devices 4 --model_parallel_size 2 --expert_parallel_size 2 \\
    --expert_sharding_size 2 --tokens 1024 --dim 512 --hidden 1024 --num_experts 8 --top_k 2
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
    -m lightning_efficient parm plan --model_parallel_size 8 --expert_parallel_size 2 --expert_sharding_size 8 ...

--tokens is what one rank gets in a step: sequences in its micro-batch times their length.
"""


def main(argv: Sequence[str]) -> int:
    """Run `parm` with the words after it.

    Args:
        argv: e.g. `["plan", "--devices", "4", "--expert_parallel_size", "4"]`.

    Returns:
        The exit code: 0, or 1 when a process failed.

    Raises:
        UserError: An option is wrong.
    """
    options = _parser().parse_args(list(argv))
    _check(options)
    return run_on_ranks(_run, options, options.devices)


def recommended_yaml(choice: Choice, sizes: MoESizes) -> str:
    """The block of a recipe that fixes the choice."""
    schedule = choice.schedule
    return (
        "trainer:\n"
        "  strategy:\n"
        "    class_path: lightning_efficient.strategies.ParmStrategy\n"
        "    init_args:\n"
        f"      model_parallel_size: {sizes.model_parallel}\n"
        f"      expert_parallel_size: {sizes.expert_parallel}\n"
        f"      expert_sharding_size: {sizes.expert_sharding}\n"
        f"      schedule: {schedule.name}\n"
        f"      chunks: {schedule.chunks}\n"
    )


def as_json(plan: Plan, choice: Choice, sizes: MoESizes) -> dict[str, Any]:
    """Everything that was measured, predicted and chosen, as plain values; times in seconds."""
    return {
        "schedule": choice.schedule.name,
        "chunks": choice.schedule.chunks,
        "reason": explain(choice),
        "yaml": recommended_yaml(choice, sizes),
        "plan": plan.as_dict(),
    }


def _run(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    on = "cpu"
    if options.backend == "nccl":
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        torch.cuda.set_device(local_rank)
        on = f"cuda:{local_rank}"
    timeout = timedelta(seconds=options.timeout)
    dist.init_process_group(
        options.backend, init_method=rendezvous, rank=rank, world_size=options.devices, timeout=timeout
    )
    try:
        sizes = MoESizes(options.model_parallel_size, options.expert_parallel_size, options.expert_sharding_size)
        topology = MoETopology.create(sizes, device_type=on.partition(":")[0], timeout=timeout)
        torch.manual_seed(0)
        dtype: torch.dtype = getattr(torch, options.dtype)
        layer = MoELayer(
            options.dim,
            options.hidden,
            options.num_experts,
            options.top_k,
            activation=options.activation,
            capacity_factor=options.capacity_factor,
            min_capacity=options.min_capacity,
        ).to(device=on, dtype=dtype)
        parallelize(layer, topology)
        auto = AutoSchedule(
            topology,
            splits=("before", "after") if options.split == "both" else (options.split,),
            chunks=options.chunks,
            trials=options.trials,
            timeout_s=options.timeout,
        )
        # One rank alone writes to the terminal.
        with Console(stderr=True, quiet=rank != 0).status("measuring links and the layer"):
            x_SM = torch.zeros(options.tokens, options.dim, device=on, dtype=dtype)
            auto.schedule_for(layer, x_SM)
        if rank == 0:
            _show(auto.plan, auto.plan.choices[LayerShape.of(layer, x_SM)], sizes, options)
    finally:
        dist.destroy_process_group()


def _show(plan: Plan, choice: Choice, sizes: MoESizes, options: argparse.Namespace) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if plan.links is not None:
        console.print(links_table(plan.links))
    if choice.predictions:
        console.print(choice_table(choice))
    console.print(f"[bold]{explain(choice)}[/bold]\n")
    console.print(recommended_yaml(choice, sizes), markup=False)
    if options.json:
        options.json.write_text(json.dumps(as_json(plan, choice, sizes), indent=2) + "\n", encoding="utf-8")


def _check(options: argparse.Namespace) -> None:
    options.devices = settle_ranks("--devices", options.devices)
    if options.devices < 2:
        raise UserError(f"--devices {options.devices}: one process has nobody to send to. Give 2 or more.")
    for name, value, least in (("trials", options.trials, 0), ("chunks", options.chunks, 1)):
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: it is a number from {least} up. Give {least} or more.")
    if options.timeout <= 0:
        raise UserError(f"--timeout {options.timeout:g}: it is a time in seconds. Give a number above 0.")
    options.backend = settle_backend(options.backend, options.devices)
    try:
        if options.expert_parallel_size is None:  # as in ParmStrategy
            options.expert_parallel_size = max(1, options.devices // max(1, options.expert_sharding_size))
        sizes = MoESizes(options.model_parallel_size, options.expert_parallel_size, options.expert_sharding_size)
        sizes.check_world(options.devices)
        sizes.check_experts(options.num_experts, options.hidden)
        Capacity(options.capacity_factor, minimum=options.min_capacity)
        LayerShape(options.tokens, options.dim, options.hidden, options.num_experts, options.top_k)
    except ValueError as error:
        raise UserError(str(error)) from error


def _capacity(text: str) -> float | None:
    if text in ("null", "none", "dropless"):
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(
            f"--capacity_factor {text}: an expert has room for that many times its even share. Give a number above 0, "
            "or null to drop nothing."
        )
    return value


def _ranks(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"--expert_parallel_size {text}: it is a number of ranks, or auto for all of them.") from error


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="lightning-efficient parm", description="Tools for mixture-of-experts training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="plan")
    plan = commands.add_parser(
        "plan",
        help="choose the schedule of a layer on these machines",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="lightning-efficient parm plan [sizes of groups] [sizes of the layer] [options]",
    )
    groups = plan.add_argument_group("groups, as in ParmStrategy")
    groups.add_argument("--devices", type=int, metavar="N", help="processes to start here (default: 2)")
    for name, kind, default, text in (
        ("model_parallel_size", int, 1, "ranks with the same tokens (default: 1)"),
        ("expert_parallel_size", _ranks, None, "ranks that share the experts (default: auto, all of them)"),
        ("expert_sharding_size", int, 1, "ranks that share an expert (default: 1)"),
    ):
        groups.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=text)
    layer = plan.add_argument_group("layer, as in MoELayer")
    layer.add_argument("--tokens", type=int, default=1024, metavar="N", help="of a rank in a step (default: 1024)")
    layer.add_argument("--dim", type=int, default=512, metavar="N", help="size of a token (default: 512)")
    layer.add_argument("--hidden", type=int, default=1024, metavar="N", help="of an expert (default: 1024)")
    layer.add_argument("--num_experts", type=int, default=8, metavar="N", help="default: 8")
    layer.add_argument("--top_k", type=int, default=2, metavar="N", help="experts per token (default: 2)")
    layer.add_argument(
        "--capacity_factor", type=_capacity, default=1.25, metavar="F", help="default: 1.25; null: nothing is dropped"
    )
    layer.add_argument("--min_capacity", type=int, default=4, metavar="N", help="fewest slots (default: 4)")
    layer.add_argument("--activation", choices=_ACTIVATIONS, default="swiglu", help="default: swiglu")
    layer.add_argument("--dtype", choices=_DTYPES, default="float32", help="of what travels (default: float32)")
    choice = plan.add_argument_group("choice")
    choice.add_argument(
        "--split",
        choices=("both", "before", "after"),
        default="both",
        help="where tokens may be split: before the gate (S1) or after it (S2); default: both",
    )
    choice.add_argument("--chunks", type=int, metavar="N", help="only this many chunks (default: the best)")
    choice.add_argument(
        "--trials", type=int, default=40, metavar="N", help="most runs of the layer; 0: predict only (default: 40)"
    )
    choice.add_argument("--backend", choices=("auto", "gloo", "nccl"), default="auto", help="default: nccl if it can")
    choice.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for one step (default: 60)")
    choice.add_argument("--json", type=Path, metavar="FILE", help="also write everything to this file")
    return parser
