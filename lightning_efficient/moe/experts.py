r"""The experts: feed-forward nets of equal shape, their weights stacked, and sharded over ranks.

.. math:: E_e(x) = W^{out}_e \, \sigma(W^{in}_e x), \qquad \text{or}\quad
          W^{out}_e (\mathrm{silu}(W^{gate}_e x) \odot W^{up}_e x) \;\text{for swiglu}

Weights on rank (ep, esp) are experts [ep E/EP, (ep + 1) E/EP) and hidden units [esp H/ESP, (esp + 1) H/ESP): what it
computes is a partial sum over ESP.

Dimension letters: E experts, R rows of an expert, N rows of all, M model size, H hidden size, G matrices before the
activation (2 for swiglu, else 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from typing_extensions import override

from lightning_efficient.moe.topology import MoETopology

Activation: TypeAlias = Literal["swiglu", "gelu", "relu"]


@dataclass(frozen=True)
class ExpertWeights:
    """What the experts of this rank compute with, plain tensors in the dtype of the rows.

    Args:
        into_EMN: (experts, M, G * hidden units here).
        out_EHM: (experts, hidden units here, M).
        bias_in_EN: (experts, G * hidden units here), or None.
        bias_out_EM: (experts, M), or None; zeros on all but one rank of an ESP group, as the sum counts it once.
    """

    into_EMN: Tensor
    out_EHM: Tensor
    bias_in_EN: Tensor | None = None
    bias_out_EM: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> ExpertWeights:
        """Return the weights with each tensor changed."""
        return ExpertWeights(*(None if each is None else change(each) for each in self._tensors))  # type: ignore[arg-type]

    @property
    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.into_EMN, self.out_EHM, self.bias_in_EN, self.bias_out_EM

    @cached_property
    def of_each(self) -> list[ExpertWeights]:
        """The weights of each expert alone.

        Cut once for all chunks: the gradients of the parts are put together once, where each slice by itself would
        have a gradient of the size of the whole.
        """
        cut = [None if each is None else each.split(1) for each in self._tensors]
        return [
            ExpertWeights(*(None if each is None else each[number] for each in cut))  # type: ignore[arg-type]
            for number in range(len(self.into_EMN))
        ]


class Experts(nn.Module):
    """The stacked weights of all experts; see the module's docstring.

    Args:
        num_experts: E.
        dim: M.
        hidden: H.
        activation: ``swiglu``, ``gelu`` or ``relu``.
        bias: give both maps a bias.

    Attributes:
        w_in: (E, M, G, H).
        w_out: (E, H, M).
        b_in: (E, G, H), or None.
        b_out: (E, M), or None.

    Raises:
        ValueError: a size is below 1, or there is no such activation.
    """

    def __init__(
        self, num_experts: int, dim: int, hidden: int, *, activation: Activation = "swiglu", bias: bool = False
    ) -> None:
        super().__init__()
        for name, size in (("num_experts", num_experts), ("dim", dim), ("hidden", hidden)):
            if size < 1:
                raise ValueError(f"{name} is {size}: experts need at least 1. Set it to 1 or more.")
        if activation not in ("swiglu", "gelu", "relu"):
            raise ValueError(f"There is no activation {activation!r}: choose 'swiglu', 'gelu' or 'relu'.")
        self.num_experts, self.dim, self.hidden, self.activation = num_experts, dim, hidden, activation
        self.matrices = G = 2 if activation == "swiglu" else 1
        self.w_in = nn.Parameter(torch.empty(num_experts, dim, G, hidden))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.b_in = nn.Parameter(torch.empty(num_experts, G, hidden)) if bias else None
        self.b_out = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self._counts_output_bias = True
        self.reset_parameters()

    @override
    def extra_repr(self) -> str:
        """Describe it within a printed module."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, hidden={self.hidden}, activation={self.activation}, "
            f"bias={self.b_in is not None}"
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, uniform as in ``nn.Linear``; biases start at 0.

        Each expert has a generator of its own, seeded from torch's global one, so that its weights are the same
        however the experts are spread, and no rank ever holds more than its own and one expert besides.
        """
        if self.w_in.is_meta:
            return
        seed = int(torch.randint(2**62, ()).item())
        for number, parameter in enumerate((self.w_in, self.w_out)):
            bound = 1 / math.sqrt(self.dim if parameter is self.w_in else self.hidden)
            experts, inner = _owned(parameter)
            whole = torch.empty(parameter.shape[1:], dtype=parameter.dtype, device=parameter.device)
            for row, expert in enumerate(experts):
                generator = torch.Generator(parameter.device).manual_seed((seed + 2 * expert + number) % 2**63)
                whole.uniform_(-bound, bound, generator=generator)
                local(parameter)[row].copy_(whole[inner])
        for bias in (self.b_in, self.b_out):
            if bias is not None:
                local(bias).zero_()

    def shard(self, topology: MoETopology) -> None:
        """Keep the part of this rank: every parameter becomes a DTensor over (edp, ep, esp).

        All ranks must hold equal weights before.

        Args:
            topology: the groups.

        Raises:
            ValueError: the sizes do not divide.
        """
        topology.sizes.check_experts(self.num_experts, self.hidden)
        if topology.mesh is None:
            return
        for name, hidden_dim in (("w_in", 3), ("w_out", 1), ("b_in", 2), ("b_out", None)):
            parameter = getattr(self, name)
            if parameter is None:
                continue
            part = parameter.detach().chunk(topology.ep.size, 0)[topology.ep.rank]
            if hidden_dim is not None:
                part = part.chunk(topology.esp.size, hidden_dim)[topology.esp.rank]
            over_esp = Replicate() if hidden_dim is None else Shard(hidden_dim)
            sharded = DTensor.from_local(
                part.contiguous().clone(), topology.mesh, (Replicate(), Shard(0), over_esp), run_check=False
            )
            setattr(self, name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        self._counts_output_bias = topology.esp.rank == 0

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        """Return the weights of this rank in a dtype; a gradient reaches each parameter even if no row came.

        Args:
            dtype: of the rows.
        """
        into, out = local(self.w_in).to(dtype).flatten(2), local(self.w_out).to(dtype)
        bias_in = bias_out = None
        if self.b_in is not None and self.b_out is not None:
            bias_in, bias_out = local(self.b_in).to(dtype).flatten(1), local(self.b_out).to(dtype)
            if not self._counts_output_bias:
                # All ranks of an ESP group get the gradients of the same rows: each has the whole gradient.
                bias_out = bias_out - bias_out.detach()
        return ExpertWeights(into, out, bias_in, bias_out)

    @override
    def forward(self, x: Tensor, weights: ExpertWeights, counts: Sequence[int] | None = None) -> Tensor:
        """Run the experts of this rank on rows of theirs.

        Args:
            x: (E, R, M) for equally many rows of each expert, or (N, M) with ``counts``.
            weights: of this rank; see :meth:`weights`.
            counts: rows of each expert.
        """
        return self.padded(x, weights) if counts is None else self.ragged(x, counts, weights)

    def padded(self, x_ERM: Tensor, weights: ExpertWeights) -> Tensor:
        """Return (E, R, M) for equally many rows of each expert here."""
        h_ERN = torch.bmm(x_ERM, weights.into_EMN)
        if weights.bias_in_EN is not None:
            h_ERN = h_ERN + weights.bias_in_EN[:, None]
        y_ERM = torch.bmm(self._activate(h_ERN), weights.out_EHM)
        return y_ERM if weights.bias_out_EM is None else y_ERM + weights.bias_out_EM[:, None]

    def ragged(self, x_NM: Tensor, counts: Sequence[int], weights: ExpertWeights) -> Tensor:
        """Return (N, M) for rows in the order of experts.

        Args:
            x_NM: rows; the first ``counts[0]`` of expert 0 here, and so on.
            counts: rows of each expert here.
            weights: of this rank.
        """
        if _grouped_mm_is_sound(x_NM, weights):
            return self._grouped(x_NM, counts, weights)
        rows = x_NM.split(list(counts))
        return torch.cat([self.padded(x_RM[None], each)[0] for x_RM, each in zip(rows, weights.of_each, strict=True)])

    def _grouped(self, x_NM: Tensor, counts: Sequence[int], weights: ExpertWeights) -> Tensor:
        ends_E = torch.tensor(counts, device=x_NM.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        h_NN = F.grouped_mm(x_NM, weights.into_EMN, offs=ends_E)
        y_NM: Tensor = F.grouped_mm(self._activate(h_NN), weights.out_EHM, offs=ends_E)
        return y_NM

    def _activate(self, h: Tensor) -> Tensor:
        if self.activation == "swiglu":
            gate, up = h.chunk(2, -1)
            return F.silu(gate) * up
        return F.gelu(h) if self.activation == "gelu" else F.relu(h)


def local(parameter: Tensor) -> Tensor:
    """Return the part of a parameter that is on this rank; gradients reach the parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _grouped_mm_is_sound(x_NM: Tensor, weights: ExpertWeights) -> bool:
    """Whether ``grouped_mm`` may run: on a GPU in bfloat16, without bias, strides of 16 bytes, with at least a row."""
    return (
        x_NM.is_cuda
        and x_NM.dtype == torch.bfloat16
        and x_NM.shape[0] > 0
        and weights.bias_in_EN is None
        and hasattr(F, "grouped_mm")
        and all(size % 8 == 0 for each in (weights.into_EMN, weights.out_EHM) for size in each.shape[1:])
    )


def _owned(parameter: Tensor) -> tuple[range, tuple[slice, ...]]:
    """Which experts this rank has, and which part of each."""
    if not isinstance(parameter, DTensor):
        return range(parameter.shape[0]), ()
    bounds = [slice(0, size) for size in parameter.shape]
    for mesh_dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            size = parameter.to_local().shape[placement.dim]
            begin = parameter.device_mesh.get_local_rank(mesh_dim) * size
            bounds[placement.dim] = slice(begin, begin + size)
    return range(bounds[0].start, bounds[0].stop), tuple(bounds[1:])
