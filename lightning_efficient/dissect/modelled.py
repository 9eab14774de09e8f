"""Sharded training on machines that are not here, by formula: modelled, never measured, and labelled so.

Letters: N parameters, n ranks, L layers, b bytes of a parameter, F operations of a step and rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lightning_efficient.dissect.collectives import AlphaBeta

TECHNIQUES = ("Z2", "Z3", "R", "O")

_HOST_ADAM_BYTES = 28
"""Read and written per parameter by Adam on the host: gradient 4, weight and both moments 8 each."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a step of a model is, on one rank.

    Attributes:
        parameters: N.
        layers: L; parameters are gathered one layer at a time.
        tokens: per step and rank.
        model_flops: F without recomputation, see :class:`~lightning_efficient.dissect.FlopCount`.
        recompute_flops: more of them with R.
        saved_bytes: kept by forward, see :func:`~lightning_efficient.dissect.predict_memory`.
        saved_bytes_recomputed: kept with R.
        bytes_per_parameter: b, of weights and gradients; the optimizer holds 12 more (a float32 weight, two moments).
    """

    parameters: int
    layers: int
    tokens: int
    model_flops: float
    recompute_flops: float
    saved_bytes: int
    saved_bytes_recomputed: int
    bytes_per_parameter: int = 2


@dataclass(frozen=True, slots=True)
class Cluster:
    """What it runs on.

    Attributes:
        ranks: n.
        flops_per_s: that a rank reaches: its peak times the utilisation that was measured without sharding.
        links: times of ``all_gather`` and ``reduce_scatter`` by bytes of the whole message.
        host_bytes_per_s: between a device and its host, each way.
        host_memory_bytes_per_s: that the host's optimizer gets per rank.
    """

    ranks: int
    flops_per_s: float
    links: Mapping[str, AlphaBeta]
    host_bytes_per_s: float = 25e9
    host_memory_bytes_per_s: float = 10e9


@dataclass(frozen=True, slots=True)
class ModelledStep:
    """A step by formula.

    Attributes:
        compute_s: of the device.
        communication_s: of the ranks, none of it hidden.
        offload_s: of moving to and from the host, and of its optimizer.
        tokens_per_s: over all ranks.
        memory_bytes: of a device.
        label: always ``modelled``.
    """

    compute_s: float
    communication_s: float
    offload_s: float
    tokens_per_s: float
    memory_bytes: int
    label: str = "modelled"

    @property
    def step_s(self) -> float:
        """All three, one after the other."""
        return self.compute_s + self.communication_s + self.offload_s


def modelled_step(size: ModelSize, cluster: Cluster, *, techniques: Collection[str]) -> ModelledStep:
    r"""Model a step of sharded training.

    With :math:`B = N b`, and :math:`t(x)` the time of a collective over :math:`x` bytes, a layer at a time:

    - compute: :math:`(F + [R] F_R) / \text{rate}`
    - communication, Z2: :math:`L\,(t_{gather}(B/L) + t_{scatter}(B/L))`; Z3 gathers once more, in backward
    - offload: gradients go to the host and weights come back, :math:`(g + 1)\, B / n` over the host's link, where Z3
      fetches its weights for both gathers, :math:`g = 2`; and Adam's 28 bytes for each of :math:`N / n` parameters
    - memory, weights: Z2 :math:`B + B/n` (gathered until backward, and the shard); Z3 :math:`B/n + 2B/L`, two layers;
      with O the shards are the host's
    - memory, gradients: :math:`B/n + B/L`, one layer whole; with O :math:`B/L`
    - memory, optimizer: :math:`12 N / n`; with O none
    - memory, activations: what forward keeps, with or without R

    Nothing overlaps, which is the slow end: a schedule that hides all communication takes the larger of the two.

    Args:
        size: the model.
        cluster: the machine.
        techniques: ``Z2`` or ``Z3``, and any of ``R`` and ``O``.

    Raises:
        ValueError: an unknown technique, or not exactly one of Z2 and Z3; or a link's times are missing.
    """
    chosen = set(techniques)
    if unknown := chosen - set(TECHNIQUES):
        raise ValueError(f"There is no model of {', '.join(sorted(unknown))}: there are {', '.join(TECHNIQUES)}.")
    if len(chosen & {"Z2", "Z3"}) != 1:
        raise ValueError(f"{'+'.join(sorted(chosen)) or 'none'} shards in no or in two ways: give one of Z2 and Z3.")
    if missing := {"all_gather", "reduce_scatter"} - set(cluster.links):
        raise ValueError(f"The cluster has no times of {', '.join(sorted(missing))}: measure them with bench comm.")
    z3, recompute, offload = "Z3" in chosen, "R" in chosen, "O" in chosen
    n, layers = cluster.ranks, size.layers
    whole = size.parameters * size.bytes_per_parameter
    gathers = 2 if z3 else 1

    flops = size.model_flops + recompute * size.recompute_flops
    compute_s = flops / cluster.flops_per_s
    gather_s = cluster.links["all_gather"].predict(whole / layers)
    scatter_s = cluster.links["reduce_scatter"].predict(whole / layers)
    communication_s = layers * (gathers * gather_s + scatter_s) if n > 1 else 0.0
    moved_s = (gathers + 1) * whole / n / cluster.host_bytes_per_s
    adam_s = _HOST_ADAM_BYTES * size.parameters / n / cluster.host_memory_bytes_per_s
    offload_s = offload * (moved_s + adam_s)

    shard = 0.0 if offload else whole / n
    weights = shard + (2 * whole / layers if z3 else whole)
    gradients = shard + whole / layers
    optimizer = 0.0 if offload else 12 * size.parameters / n
    saved = size.saved_bytes_recomputed if recompute else size.saved_bytes
    return ModelledStep(
        compute_s=compute_s,
        communication_s=communication_s,
        offload_s=offload_s,
        tokens_per_s=n * size.tokens / (compute_s + communication_s + offload_s),
        memory_bytes=round(weights + gradients + optimizer + saved),
    )
