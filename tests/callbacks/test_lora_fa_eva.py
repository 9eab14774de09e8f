"""LoRAFA with the optimizers that watch layers: the same steps as on plain adapters, and the cost is said."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_efficient.callbacks import AttachOptimizer
from lightning_efficient.optimizers import Eva, EvaP
from tests.callbacks.lora_fa_toys import Toy, batches, equal, fit, lora, tensors

TOLERANCE = 1e-10
"""Float64 sums in another order give up to 2e-12 behind EvaP's orthogonalisation; a wrong capture shows as 1e-3."""

SEEN: dict[str, Any] = {"kv_samples": None, "g_scale": "expectation", "rescale": "clip"}
OPTIMIZERS: dict[str, Any] = {
    "eva": lambda p: Eva(p, lr=0.02, variant="eva", **SEEN),
    "eva_f": lambda p: Eva(p, lr=0.02, variant="eva_f", **SEEN),
    "eva_s": lambda p: Eva(p, lr=0.02, variant="eva_s"),
    "eva_p": lambda p: EvaP(p, lr=0.02, rank=2),
}


class PlainAdapter(nn.Module):
    """LoRA-FA in two linears."""

    def __init__(self, base: nn.Linear, A: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.down = nn.Linear(base.in_features, len(A), bias=False, dtype=A.dtype)
        self.up = nn.Linear(len(A), base.out_features, bias=False, dtype=A.dtype)
        self.down.weight.data = A
        self.down.requires_grad_(False)
        nn.init.zeros_(self.up.weight)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


class WithOptimizer(Toy):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.model[0], self.model[2] = nn.Identity(), nn.Tanh()
        self.double()

    @override
    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> Optimizer:
        optimizer: Optimizer = OPTIMIZERS[self.name]([p for p in self.parameters() if p.requires_grad])
        return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_steps_are_those_on_plain_adapters(name: str) -> None:
    ours, plain, callback = WithOptimizer(name), WithOptimizer(name), lora(adapter_dtype="float64")
    watches = name in ("eva", "eva_f")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(ours, callback, AttachOptimizer(), precision="64-true")
    about_us = [str(each.message) for each in said if "no longer lean" in str(each.message)]
    assert len(about_us) == watches
    assert callback.stats["lora_fa/fell_back"] == (2 if watches else 0)
    assert callback.stats["lora_fa/adapted"] == (0 if watches else 2)

    downs = tensors(ours, "lora_A")
    for index in (1, 3):
        A = downs[f"model.{index}.lora_A.default.weight"]
        plain.model[index] = PlainAdapter(plain.model[index], A, 2.0)
    fit(plain, AttachOptimizer(), precision="64-true")
    for index in (1, 3):
        found, expected = ours.model[index].lora_B["default"].weight, plain.model[index].up.weight
        assert expected.any()
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(ours.head.weight, plain.head.weight, rtol=0, atol=TOLERANCE)


# ---- export -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning:peft")
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank_pattern": {"3": 2}, "alpha_pattern": {"1": 9.0}}])
def test_stock_peft_loads_what_fit_exports(settings: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    module = Toy()
    fit(module, lora(export_dir=str(tmp_path / "adapter"), **settings))
    with_peft = peft.PeftModel.from_pretrained(Toy().model, str(tmp_path / "adapter"))
    stock = {name.removeprefix("base_model.model."): each for name, each in tensors(with_peft, "lora_").items()}
    assert equal(stock, tensors(module.model, "lora_"))
    # BatchNorm's running statistics are the module's own, not the adapter's.
    with_peft.base_model.model[2].load_state_dict(module.model[2].state_dict())
    x = next(iter(batches()))[0]
    torch.testing.assert_close(with_peft.eval()(x), module.model.eval()(x), rtol=0, atol=1e-6)
    assert not torch.allclose(Toy().model.eval()(x), module.model(x), atol=1e-2)
