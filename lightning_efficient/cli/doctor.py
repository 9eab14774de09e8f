"""`lightning-efficient doctor`: what is installed, what is there to run on, and what is missing for what."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

import lightning_efficient
from lightning_efficient.cli.errors import CommandParser

_CORE = ("lightning", "torch", "torchmetrics", "jsonargparse", "triton", "rich", "safetensors")

# extra: (what it is for, the modules it brings)
_EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "data": ("the digits data of the vision recipes", ("sklearn",)),
    "hf": ("HFCausalLM: any causal language model of transformers", ("transformers",)),
    "peft": ("LoRA-FA on PEFT's own layers; the configuration file of an exported adapter", ("peft",)),
    "quantized": ("LoRA-FA on bases that bitsandbytes quantises", ("bitsandbytes",)),
    "flower": ("federated learning over Flower's engine", ("flwr",)),
    "plots": ("figures of the benchmarks", ("matplotlib",)),
    "bench": ("the benchmarks", ("sklearn", "psutil")),
    "docs": ("building the documentation", ("sphinx", "furo", "myst_parser")),
    "test": ("running the tests", ("pytest", "hypothesis", "pytest_timeout", "mypy", "psutil")),
}

_TOOLS = {
    "make": "the commands of the README: make quickstart, make test",
    "git": "working on the source",
    "ip": "netlab, slow links on one machine (package iproute2)",
    "tc": "netlab, slow links on one machine (package iproute2)",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked for.
        there: Whether it is there.
        detail: Its version or location, or what is missing.
        purpose: What it is for.
    """

    name: str
    there: bool
    detail: str = ""
    purpose: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything the doctor found.

    Attributes:
        versions: Python and the core packages.
        devices: What a Trainer can run on.
        backends: What ranks can talk over, and what compiles kernels.
        extras: The optional dependencies.
        tools: System programs and rights.
    """

    versions: list[Finding] = field(default_factory=list)
    devices: list[Finding] = field(default_factory=list)
    backends: list[Finding] = field(default_factory=list)
    extras: list[Finding] = field(default_factory=list)
    tools: list[Finding] = field(default_factory=list)


def main(argv: Sequence[str]) -> int:
    """Run `lightning-efficient doctor`.

    Args:
        argv: The words after `doctor`.

    Returns:
        0: a missing extra is a finding, not a failure.
    """
    parser = CommandParser(prog="lightning-efficient doctor", description="What is here, and what is missing for what.")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    arguments = parser.parse_args(list(argv))
    diagnosis = diagnose()
    if arguments.json:
        sys.stdout.write(json.dumps(asdict(diagnosis), indent=2) + "\n")
    else:
        _print(diagnosis)
    return 0


def diagnose() -> Diagnosis:
    """Look around, without importing anything optional and without starting a process group."""
    return Diagnosis(
        versions=_versions(), devices=_devices(), backends=_backends(), extras=_extras(), tools=[*_tools(), _root()]
    )


def _versions() -> list[Finding]:
    found = [
        Finding("lightning-efficient", True, lightning_efficient.__version__),
        Finding("python", True, f"{platform.python_version()} ({sys.executable})"),
        Finding("system", True, platform.platform()),
    ]
    for name in _CORE:
        version = _version(name)
        purpose = "fused kernels on a GPU" if name == "triton" else ""
        found.append(Finding(name, version is not None, version or "not installed", purpose))
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [
        Finding("cpu", True, f"{usable} usable cores, {torch.get_num_threads()} torch threads"),
        Finding("cuda", bool(cuda), ", ".join(cuda) or f"no device (torch {torch.__version__})"),
        Finding("mps", torch.backends.mps.is_available(), "" if torch.backends.mps.is_available() else "no device"),
    ]


def _backends() -> list[Finding]:
    gloo = dist.is_available() and dist.is_gloo_available()
    nccl = dist.is_available() and dist.is_nccl_available()
    triton = importlib.util.find_spec("triton") is not None
    return [
        Finding("gloo", gloo, "" if gloo else "not in this torch", "ranks on CPUs"),
        Finding("nccl", nccl, "" if nccl else "not in this torch", "ranks on NVIDIA GPUs"),
        Finding("triton", triton, "" if triton else "not installed", "fused kernels on a GPU"),
    ]


def _extras() -> list[Finding]:
    found = []
    for extra, (purpose, modules) in _EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        remedy = f"missing {', '.join(missing)}: pip install 'lightning-efficient[{extra}]'" if missing else ""
        found.append(Finding(extra, not missing, remedy, purpose))
    return found


def _tools() -> list[Finding]:
    # ip and tc live in sbin, which is not on every user's PATH.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    places = {tool: shutil.which(tool, path=path) for tool in _TOOLS}
    return [Finding(tool, place is not None, place or "not found", _TOOLS[tool]) for tool, place in places.items()]


def _root() -> Finding:
    root = hasattr(os, "geteuid") and os.geteuid() == 0 and Path("/proc/self/ns/net").exists()
    return Finding("root", root, "" if root else "not root, or not Linux", "netlab, which makes network namespaces")


def _print(diagnosis: Diagnosis) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for title, findings in vars(diagnosis).items():
        console.print(f"[bold]{title}[/]")
        for finding in findings:
            mark = "[green]ok[/]" if finding.there else "[yellow]--[/]"
            purpose = f"[dim]for {escape(finding.purpose)}[/]" if finding.purpose else ""
            details = "; ".join(text for text in (escape(finding.detail), purpose) if text)
            console.print(f"  {mark}  {finding.name:<20} {details}")
        console.print()
