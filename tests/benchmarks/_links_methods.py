"""The ways to exchange gradients that `compression_links` compares, by name.

A name is `method[:rank][@bucket_cap_mb]`: `ddp`, `acp_sgd:4`, `acp_sgd:32@1000`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook as powerSGD
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient.compression import COMPRESSORS, register_compressor

DDP_CAP_MB = 25.0
COMPRESSED_CAP_MB = 4.0
ONE_BUCKET_MB = 100_000.0

LOCAL = "no_communication"
"""Plain DDP under `no_sync`: what a step costs when nothing is sent."""
PLAIN = "ddp"
TORCH = "torch_power_sgd"
_RANKED = (TORCH, "power_sgd", "acp_sgd")


@dataclass(frozen=True, slots=True)
class Method:
    """One way to exchange gradients.

    Attributes:
        name: As given.
        kind: `no_communication`, `ddp`, `torch_power_sgd` or a name of `lightning_efficient.compression.COMPRESSORS`.
        rank: Of low-rank methods, else 0.
        bucket_cap_mb: DDP's. Torch's hook gets one bucket: over gloo it aborts or hangs with more.
    """

    name: str
    kind: str
    rank: int
    bucket_cap_mb: float

    @classmethod
    def parse(cls, name: str) -> "Method":
        match = re.fullmatch(r"([a-z_]+)(?::(\d+))?(?:@(\d+(?:\.\d+)?))?", name)
        known = (LOCAL, PLAIN, TORCH, *COMPRESSORS)
        if match is None or match[1] not in known:
            raise ValueError(f"method {name!r} is unknown: write method[:rank][@bucket_cap_mb] with one of {known}.")
        kind, rank = match[1], int(match[2] or (4 if match[1] in _RANKED else 0))
        if rank and kind not in _RANKED:
            raise ValueError(f"method {name!r} has no rank: leave out {match[2]!r}.")
        default = {LOCAL: DDP_CAP_MB, PLAIN: DDP_CAP_MB, TORCH: ONE_BUCKET_MB}.get(kind, COMPRESSED_CAP_MB)
        return cls(name, kind, rank, float(match[3] or default))

    def wrap(self, model: nn.Module) -> DistributedDataParallel:
        """Wrap a model so that its backward exchanges gradients this way."""
        # Every rank builds the same model from the same seed, so there is nothing to send at the start.
        ddp = DistributedDataParallel(
            model, bucket_cap_mb=self._cap(), gradient_as_bucket_view=True, init_sync=False, broadcast_buffers=False
        )
        if self.kind == TORCH:
            # Hook state is per bucket, so it may start only once DDP has settled its buckets: at the third step.
            state = powerSGD.PowerSGDState(None, matrix_approximation_rank=self.rank, start_powerSGD_iter=2)
            ddp.register_comm_hook(state, powerSGD.powerSGD_hook)
        elif self.kind in COMPRESSORS:
            options = {"rank": self.rank} if self.rank else {}
            register_compressor(ddp, COMPRESSORS[self.kind](**options))
        return ddp

    def _cap(self) -> float | None:
        # DDP treats its default apart (a small first bucket), so do not spell it out.
        return None if self.bucket_cap_mb == DDP_CAP_MB else self.bucket_cap_mb


class Trainee:
    """A model, its optimizer and its data under one method."""

    def __init__(self, method: Method, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.method = method
        self.ddp = method.wrap(model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self.batch = batch

    def step(self) -> None:
        """One training step: forward, backward with the exchange, update."""
        x, y = self.batch
        with self.ddp.no_sync() if self.method.kind == LOCAL else nullcontext():
            F.cross_entropy(self.ddp(x).flatten(0, -2), y.flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


class Transformer(nn.Module):
    """A language model with tied head: 5.26 M parameters at its default size."""

    def __init__(self, *, width: int = 320, layers: int = 4, vocab: int = 1024) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTD = self.layers(self.embed(x_BT))
        return F.linear(hidden_BTD, self.embed.weight)


@contextmanager
def same_weights(seed: int = 0) -> Iterator[None]:
    """Build models inside: all ranks and methods get the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
