"""Results made by hand, whose figures are easy to check."""

from __future__ import annotations

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
    Status,
    Straggler,
    Throughput,
    Window,
)

MS, MIB = 1e-3, 2**20


def quantiles(value: float, *, spread: float = 0.01, count: int = 20) -> Quantiles:
    return Quantiles(count, value, value * (1 + spread), value, value * spread)


def breakdown(layers: int = 4) -> Breakdown:
    """Each layer: up_proj 2 + 4 ms and q_proj 1 + 2 ms; beside them embedding 3, optimizer 6, data 1 ms."""
    rows = [Row("model.embed", "embedding", "Embedding", 1, forward_s=1 * MS, backward_s=2 * MS)]
    for layer in range(layers):
        path = f"model.layers.{layer}"
        rows += [
            Row(f"{path}.mlp.up_proj", "mlp", "Linear", 1, 2 * MS, 0, 4 * MS, saved_bytes=MIB, flops=10**9),
            Row(f"{path}.attn.q_proj", "qkv", "Linear", 1, 1 * MS, 0, 2 * MS, saved_bytes=MIB // 2, flops=10**8),
        ]
    rows += [Row("<optimizer AdamW>", optimizer_s=6 * MS), Row("<data>", data_s=1 * MS)]
    return Breakdown("host", sum(row.total_s for row in rows), tuple(rows))


def report(
    *, tokens_per_s: float = 1000.0, step_s: float = 0.1, spread: float = 0.01, saved: int = 8 * MIB, world: int = 1
) -> DissectReport:
    ranks = tuple(RankTimes(rank, 0.05, 0.01, 0, 0.02, 0.006, 0.001, 0.01, 0.003) for rank in range(world))
    return DissectReport(
        Machine("Test <processor> & co", "cpu", world, "DDPStrategy", "32-true", 1, "2.13", "2.6.6"),
        Window(),
        Throughput(
            quantiles(step_s, spread=spread), quantiles(step_s), quantiles(MS), 1, tokens_per_s, tokens_per_s, 8
        ),
        Flops(10**12, 10**12, note="no peak is known"),
        Memory(600 * MIB, None, 1 * MIB, 1 * MIB, 2 * MIB, saved),
        breakdown(),
        collectives=(Collective("all_reduce", MIB, 4, 1 * MS),) if world > 1 else (),
        operators=(Operator("aten::addmm", "gemm", 28, 0.02), Operator("aten::mul", "elementwise", 8, 0.001)),
        ranks=ranks,
        straggler=Straggler(1, 5 * MS, "model.layers.3.mlp.up_proj", 4 * MS) if world > 1 else None,
        loss=2.5,
        notes=("A note.",),
    )


def case(
    technique: str,
    *,
    status: Status = "ok",
    reason: str = "",
    batch: int = 4,
    world: int = 1,
    again: bool = False,
    **figures: float,
) -> CaseResult:
    axes = {"model": "tiny", "technique": technique, "seq": 128, "micro_batch": batch, "world": world}
    name = f"tiny/{technique}/seq128/mb{batch}/world{world}"
    measured = report(world=world, **figures) if status == "ok" else None  # type: ignore[arg-type]
    if again:
        return CaseResult(f"{name}/again", {**axes, "run": 2}, status, reason, 1.0, measured)
    return CaseResult(name, axes, status, reason, 1.0, measured)
