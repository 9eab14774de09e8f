"""Modelled steps: terms by hand, and the orderings that were published for sharded training."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim import SGD

from lightning_efficient.dissect import FlopCount, MemoryPrediction, predict_memory
from lightning_efficient.dissect.collectives import AlphaBeta
from lightning_efficient.dissect.modelled import Cluster, ModelledStep, ModelSize, modelled_step
from lightning_efficient.models import LLAMA_PRESETS, Llama, LlamaConfig

LINKS = {"all_gather": AlphaBeta(1e-3, 1e-9), "reduce_scatter": AlphaBeta(2e-3, 2e-9)}
CLUSTER = Cluster(4, 1e12, LINKS, host_bytes_per_s=1e9, host_memory_bytes_per_s=2e9)
SIZE = ModelSize(8_000_000, 10, 100, 2e12, 1e12, 5_000_000, 1_000_000)


def test_terms_by_hand() -> None:
    z2 = modelled_step(SIZE, CLUSTER, techniques=["Z2"])
    z3ro = modelled_step(SIZE, CLUSTER, techniques=["Z3", "R", "O"])

    assert z2.compute_s == 2
    assert z2.communication_s == pytest.approx(10 * (1e-3 + 1.6e-3) + 10 * (2e-3 + 3.2e-3))
    assert z2.offload_s == 0
    # Weights whole and a quarter, gradients a quarter and a layer, twelve bytes for a quarter, activations.
    assert z2.memory_bytes == 16_000_000 + 4_000_000 + 4_000_000 + 1_600_000 + 24_000_000 + 5_000_000
    assert z2.tokens_per_s == pytest.approx(4 * 100 / z2.step_s)
    assert z3ro.compute_s == 3
    assert z3ro.communication_s == pytest.approx(20 * (1e-3 + 1.6e-3) + 10 * (2e-3 + 3.2e-3))
    assert z3ro.offload_s == pytest.approx(3 * 4e6 / 1e9 + 28 * 2e6 / 2e9)
    assert z3ro.memory_bytes == 3_200_000 + 1_600_000 + 1_000_000
    assert z2.label == z3ro.label == "modelled"


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten())


LAYERS = 8


def seven_b(*, recompute: bool) -> Llama:
    """A quarter of the layers of 7B, which is quicker and changes no order."""
    config = LlamaConfig(**{**LLAMA_PRESETS["7b"], "num_layers": LAYERS})
    return Llama(config, activation_checkpointing=recompute)


def batch() -> Tensor:
    return torch.zeros(4, 512, dtype=torch.int64)


def measured(*, recompute: bool) -> tuple[FlopCount, MemoryPrediction]:
    def build() -> Llama:
        return seven_b(recompute=recompute).bfloat16()

    with FakeTensorMode():
        model = seven_b(recompute=recompute)
        with FlopCount(model) as count:
            loss_of(model, batch()).backward()
    return count, predict_memory(build, batch, run=loss_of, optimizer=lambda p: SGD(p, lr=0.1))


def test_orderings_on_eight_gpus() -> None:
    plain, kept = measured(recompute=False)
    again, kept_again = measured(recompute=True)
    recompute = again.hardware_flops - plain.hardware_flops
    parameters = kept.parameter_bytes // 2
    size = ModelSize(
        parameters, LAYERS, 4 * 512, plain.model_flops, recompute, kept.saved_bytes, kept_again.saved_bytes
    )
    # 40 % of an A100's peak, and a ring at 200 GB/s.
    link = AlphaBeta(50e-6, 7 / 8 / 200e9)
    cluster = Cluster(8, 0.4 * 312e12, {"all_gather": link, "reduce_scatter": link})

    def step(*techniques: str) -> ModelledStep:
        return modelled_step(size, cluster, techniques=techniques)

    z3, z2ro, z3ro = step("Z3"), step("Z2", "R", "O"), step("Z3", "R", "O")
    # The order of an independent re-run on MI210: 977, 123 and 66 tokens/s; 40.3, 15.1 and 4.6 GB.
    assert z3.tokens_per_s > z2ro.tokens_per_s > z3ro.tokens_per_s
    assert z3.memory_bytes > z2ro.memory_bytes > z3ro.memory_bytes
    assert step("Z2").tokens_per_s > z3.tokens_per_s
    assert step("Z3", "R").memory_bytes < z3.memory_bytes


@pytest.mark.parametrize(
    ("techniques", "message"),
    [(["Z4"], "no model of Z4"), (["R"], "give one of Z2 and Z3"), (["Z2", "Z3"], "give one of Z2 and Z3")],
)
def test_combinations_without_a_model(techniques: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modelled_step(SIZE, CLUSTER, techniques=techniques)


def test_links_have_to_be_known() -> None:
    with pytest.raises(ValueError, match="no times of reduce_scatter"):
        modelled_step(SIZE, Cluster(4, 1e12, {"all_gather": LINKS["all_gather"]}), techniques=["Z2"])
