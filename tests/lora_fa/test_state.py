"""State dicts that hold the adapters and not the frozen base, and stay strict about the rest."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_efficient.lora_fa import keep_adapters_only
from lightning_efficient.lora_fa.state import A_fingerprints, base_fingerprint
from tests.lora_fa.nets import TARGETS, adapted_block, normal

X = normal(5, 12, dtype=torch.float32)
BACKENDS = ["native", "peft"]


def keys(*names: str) -> set[str]:
    return {f"{name}.lora_{half}.default.weight" for name in names for half in "AB"}


def build(backend: str, seed: int = 0, **settings: Any) -> nn.Module:
    model = adapted_block(seed=0, backend=backend, modules_to_save=["score"], **settings)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and seed:
                p.normal_(generator=torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_adapters_and_what_trains_are_kept_and_come_back(backend: str) -> None:
    model, other = build(backend, seed=3), build(backend, seed=4)
    for each in (model, other):
        keep_adapters_only(each)
    state = model.state_dict()

    assert set(state) == keys(*TARGETS) | {"score.weight", "score.bias"}
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_a_missing_half_is_still_missed(half: str) -> None:
    model = build("native")
    keep_adapters_only(model)
    state = model.state_dict()
    del state[f"first.{half}.default.weight"]

    with pytest.raises(RuntimeError, match=rf"Missing key\(s\).*first.{half}.default.weight"):
        model.load_state_dict(state)


def test_an_unknown_key_and_a_missing_head_are_errors() -> None:
    model = build("native")
    keep_adapters_only(model)
    for change in (lambda s: s.update(extra=torch.ones(1)), lambda s: s.pop("score.bias")):
        state = model.state_dict()
        change(state)
        with pytest.raises(RuntimeError, match=r"extra|score\.bias"):
            model.load_state_dict(state)


def test_handles_undo_it() -> None:
    model = build("native")
    before = set(model.state_dict())
    for handle in keep_adapters_only(model):
        handle.remove()

    assert set(model.state_dict()) == before


def test_buffers_outside_of_adapted_linears_are_kept() -> None:
    model = build("native")
    model.norm = nn.BatchNorm1d(3)
    keep_adapters_only(model)

    assert {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} <= set(model.state_dict())


def test_fingerprints_tell_bases_and_As_apart() -> None:
    one, other = adapted_block(seed=0), adapted_block(seed=1)
    trained = adapted_block(seed=0)
    with torch.no_grad():
        trained.first.lora_B["default"].weight.add_(1)

    assert base_fingerprint(one) == base_fingerprint(trained) != base_fingerprint(other)
    assert A_fingerprints(one) == A_fingerprints(other)
    assert A_fingerprints(one) != A_fingerprints(adapted_block(seed=0, init="kaiming"))
    with torch.no_grad():
        trained.first.lora_A["default"].weight[0, 0] += 1e-6
    changed = {name for name, value in A_fingerprints(trained).items() if value != A_fingerprints(one)[name]}
    assert changed == {"first.lora_A.default"}
