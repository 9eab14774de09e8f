"""What Eva's step costs on a GPU: time against fused SGD and AdamW, bandwidth of both passes, and host waits.

    python -m tests.benchmarks.eva_gpu                    # needs a CUDA device; about five minutes
    python -m tests.benchmarks.eva_gpu --device cpu --sizes 2 --rounds 3    # the same steps, to see that it runs

Part 1 steps optimizers on the layers of Llamas of 100 M to 1 B parameters with fixed gradients; part 2 trains a Llama
of 160 M under bf16 autocast and a channels-last ResNet, capture included. Methods take turns; figures are medians.
"""

import argparse
import copy
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_efficient.eva.layers import Layer
from lightning_efficient.eva.plan import Plan
from lightning_efficient.eva.step import EagerPasses, Group
from lightning_efficient.models import LLAMA_PRESETS, Llama, LlamaConfig, ResNetClassifier
from lightning_efficient.optimizers import Eva
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.timing import timed

OUT = Path(__file__).parents[2] / "docs" / "benchmarks"
DECAY = 5e-4

MakeOptimizer = Callable[[nn.Module], Optimizer]


def eva(variant: str, backend: str, **kwargs: Any) -> MakeOptimizer:
    working = {"kv_samples": None, "g_scale": "expectation", "rescale": "clip", "weight_decay": DECAY, **kwargs}
    return lambda net: Eva(net.parameters(), lr=1e-3, variant=variant, backend=backend, **working).attach(net)  # type: ignore[arg-type]


def methods(**kwargs: Any) -> dict[str, MakeOptimizer]:
    """Optimizers by name; `kwargs` go to Eva."""
    return {
        "SGD fused": lambda net: SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=DECAY, fused=True),
        "SGD foreach": lambda net: SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=DECAY, foreach=True),
        "AdamW fused": lambda net: AdamW(net.parameters(), lr=1e-3, weight_decay=DECAY, fused=True),
        "Eva, triton": eva("eva", "triton", **kwargs),
        "Eva-f, triton": eva("eva_f", "triton", **kwargs),
        "Eva-f, compiled": eva("eva_f", "compiled", **kwargs),
        "Eva-f, eager": eva("eva_f", "eager", **kwargs),
    }


def layers_of(millions: int) -> nn.Module:
    """The Linears of a Llama of about so many million parameters, each called once by the forward."""
    width = 128 * max(1, round((millions * 1e6 / 12 / 12) ** 0.5 / 128))
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    count = max(1, round(millions * 1e6 / sum(o * d for o, d in shapes)))
    return nn.ModuleList(nn.Linear(d, o, bias=False) for _ in range(count) for o, d in shapes)


def fill(net: nn.Module) -> None:
    """Run every layer once, forward and backward, so that it has a gradient and vectors."""
    for layer in net:  # type: ignore[attr-defined]
        layer(torch.randn(8, layer.in_features, device=layer.weight.device)).square().mean().backward()


def medians(steps: dict[str, Callable[[], Any]], device: torch.device, rounds: int, title: str) -> dict[str, float]:
    """Milliseconds of each step, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in track(range(rounds + 3), description=title):
        for name, step in steps.items():
            elapsed = timed(step, device)
            if round_ >= 3:
                times[name].append(elapsed)
    return {name: statistics.median(each) for name, each in times.items()}


def steps_alone(millions: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """The optimizer's step on fixed gradients, each method in turns with fused SGD."""
    rows = []
    net = layers_of(millions).to(device)
    fill(net)
    entries = sum(p.numel() for p in net.parameters())
    makers = methods(kv_every=10**9)  # the first step captures: later ones have no forward pass to do it in
    base = makers["SGD fused"](net)
    for name, make in makers.items():
        optimizer = make(net)
        if isinstance(optimizer, Eva):
            optimizer.zero_grad()
            fill(net)
        found = medians({"SGD fused": base.step, name: optimizer.step}, device, rounds, f"{millions} M, {name}")
        waits = host_waits(optimizer.step, device)
        ratio = found[name] / found["SGD fused"]
        rows.append({"parameters": entries, "method": name, "ms": found[name], "over SGD fused": ratio, "waits": waits})
        if isinstance(optimizer, Eva):
            optimizer.detach()
    return rows


def host_waits(step: Callable[[], Any], device: torch.device) -> str:
    """ "none", or what torch says of the first operation for which the host waits."""
    if device.type != "cuda":
        return "not on CUDA"
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def bandwidth(millions: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Bytes that each pass must move over its time, beside a copy of the same weights."""
    net = layers_of(millions).to(device)
    fill(net)
    layers = [Layer(str(i), each.weight) for i, each in enumerate(net)]  # type: ignore[arg-type]
    plan = Plan(layers, [0] * len(layers), [False] * len(layers), dtype=torch.float32, device=device)
    a = torch.randn(sum(plan.layout.input_sizes), device=device)
    momenta = [torch.zeros_like(layer.weight) for layer in layers]
    tensors = plan.tensors(a, momenta)
    groups = [Group(len(layers), 1e-3, 0.9, DECAY, True, False, False)]
    left, scale = torch.randn(sum(plan.layout.output_sizes), device=device), torch.ones(len(layers), device=device)
    if device.type == "cuda":
        from lightning_efficient.eva.triton_passes import TritonPasses

        passes: Any = TritonPasses()
    else:
        passes = EagerPasses()
    sources = [layer.weight.detach() for layer in layers]
    steps = {
        "copy (2 passes)": lambda: [m.copy_(s) for m, s in zip(momenta, sources, strict=True)],
        "project (1 pass)": lambda: passes.project(tensors),
        "update (5 passes)": lambda: passes.update(tensors, left, scale, groups),
    }
    with torch.no_grad():
        found = medians(steps, device, rounds, f"{millions} M, bandwidth")
    size = 4 * sum(layer.weight.numel() for layer in layers)
    speeds = {name: int(name.split("(")[1][0]) * size / found[name] / 1e6 for name in steps}
    return [
        {"pass": name, "GB/s": speed, "over copy": speed / speeds["copy (2 passes)"], "ms": found[name]}
        for name, speed in speeds.items()
    ]


def whole_steps(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Forward, backward and step, with capture."""
    rows = []
    small = device.type != "cuda"
    llama = Llama(LlamaConfig(vocab_size=32_000, **LLAMA_PRESETS["tiny" if small else "160m"]))
    ids = torch.randint(0, 32_000, (2 if small else 8, 65 if small else 1025), device=device)
    resnet = ResNetClassifier(in_channels=3, width=16 if small else 64, blocks=(1, 1) if small else (3, 4, 6, 3))
    resnet = resnet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(4 if small else 64, 3, 32 if small else 224, 32 if small else 224, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (len(images),), device=device)

    def text_loss(net: nn.Module) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return F.cross_entropy(net(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())

    def image_loss(net: nn.Module) -> Tensor:
        return F.cross_entropy(net(images), labels)

    cases: list[tuple[str, nn.Module, Callable[[nn.Module], Tensor]]] = [
        ("Llama, bf16 autocast", llama, text_loss),
        ("ResNet, channels last", resnet, image_loss),
    ]
    for title, model, loss in cases:
        steps: dict[str, Callable[[], Any]] = {}
        for name in ("SGD fused", "AdamW fused", "Eva, triton", "Eva-f, triton"):
            net = copy.deepcopy(model).to(device)
            optimizer = methods()[name](net)

            def step(net: nn.Module = net, optimizer: Optimizer = optimizer, loss: Any = loss) -> None:
                loss(net).backward()
                optimizer.step()
                optimizer.zero_grad()

            steps[name] = step
        found = medians(steps, device, rounds, title)
        base = found["SGD fused"]
        rows += [{"model": title, "method": n, "ms": ms, "over SGD fused": ms / base} for n, ms in found.items()]
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = [f"## {title}", "", f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    for row in rows:
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print, and write the page when a GPU was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default cuda")
    parser.add_argument("--sizes", nargs="*", type=int, default=[100, 300, 1000], help="millions; default 100 300 1000")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each method (default 30)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: run this on a machine with a GPU, or pass --device cpu to see that it runs.")
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    parts = {
        "The step alone": [row for size in args.sizes for row in steps_alone(size, device, args.rounds)],
        "Bandwidth of the passes": bandwidth(args.sizes[0], device, args.rounds),
        "The whole step": whole_steps(device, args.rounds),
    }
    lines = [
        "# Eva on a GPU",
        "",
        "Command: `python -m tests.benchmarks.eva_gpu "
        f"--sizes {' '.join(map(str, args.sizes))} --rounds {args.rounds}`",
        "",
        f"Device: {name}. Machine: {describe_machine()}. Date: {datetime.date.today().isoformat()}",
        "",
        *(table(title, rows) for title, rows in parts.items()),
    ]
    text = "\n".join(lines)
    print(text)
    if device.type == "cuda":
        stem = "eva_gpu_" + name.replace(" ", "_").lower()
        (OUT / f"{stem}.md").write_text(text)
        (OUT / f"{stem}.json").write_text(json.dumps(parts, indent=1) + "\n")


if __name__ == "__main__":
    main()
