"""Which layers are preconditioned in which step, where the published code crashed or did something else in silence."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.optimizers import Eva
from tests.eva.nets import CONV, MLP, SEQUENCE, equal, loss_of, relative_difference, train, weights

STRONG: dict[str, Any] = {"g_scale": "expectation", "kv_samples": None, "kv_new_weight": 0.5}


# ---- layers without a gradient ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["eva", "eva_f", "eva_s"])
def test_frozen_and_unused_layers_stay_as_they_are(variant: Any) -> None:
    model = MLP.net()
    extra = nn.Linear(3, 3).double()
    holder = nn.ModuleList([model, extra])
    model[2].requires_grad_(False)
    optimizer = Eva(holder.parameters(), variant=variant, weight_decay=0.1).attach(holder)
    before = weights(holder)
    train(model, optimizer, MLP, 3)
    after = weights(holder)
    for name in ("0.2.weight", "1.weight", "1.bias"):
        equal(after[name], before[name])
    assert (after["0.0.weight"] != before["0.0.weight"]).any()
    model[2].requires_grad_(True)
    train(model, optimizer, MLP, 2)
    assert (model[2].weight != before["0.2.weight"]).any()


def test_a_frozen_bias_leaves_the_weight_preconditioned_without_its_column() -> None:
    ends = []
    for bias in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(6, 4, bias=bias).double()
        layer.weight.data.copy_(torch.linspace(-1, 1, 24).view(4, 6))
        if bias:
            layer.bias.data.zero_()
            layer.bias.requires_grad_(False)
        train(layer, Eva([layer.weight], **STRONG).attach(layer), MLP, 4)
        ends.append(layer.weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_a_layer_that_is_used_only_now_and_then_keeps_its_average() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.always(x) + (self.sometimes(x) if self.use else 0)

    torch.manual_seed(0)
    model = Branches().double()
    optimizer = Eva(model.parameters(), **STRONG).attach(model)
    model.use = True
    train(model, optimizer, MLP, 1)
    kept = optimizer.state[model.sometimes.weight]["kv_a"].clone()
    model.use = False
    train(model, optimizer, MLP, 2, first=1)
    equal(optimizer.state[model.sometimes.weight]["kv_a"], kept)
    model.use = True
    train(model, optimizer, MLP, 1, first=3)
    new = MLP.batch(3)[0].mean(0)
    torch.testing.assert_close(
        optimizer.state[model.sometimes.weight]["kv_a"], 0.5 * (kept + new), rtol=1e-12, atol=1e-15
    )


# ---- which parameters have vectors -----------------------------------------------------------------------------------


class _Zoo(nn.Module):
    """One of everything that has no vectors, and a subclass of Linear, which has."""

    class Own(nn.Linear):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.own = self.Own(8, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.skipped = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.up = nn.ConvTranspose1d(7, 7, 1)
        self.classes = nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.skipped(self.own(x) + self.second(self.first(x).tanh()))
        return self.classes(self.up(self.head(x)))


REASONS = {
    "embedding.weight": "shared by embedding.weight and head.weight",
    "attention.in_proj_weight": "in_proj_weight of MultiheadAttention, which has no Kronecker vectors",
    "attention.out_proj.weight": "torch.nn.MultiheadAttention never calls it",
    "norm.weight": "weight of LayerNorm, which has no Kronecker vectors",
    "norm.bias": "bias of LayerNorm, which has no Kronecker vectors",
    "first.weight": "shared by first.weight and second.weight",
    "first.bias": "its weight is preconditioned by nobody",
    "skipped.weight": "skip has 'skip*'",
    "up.weight": "weight of ConvTranspose1d, which has no Kronecker vectors",
}


@pytest.mark.parametrize("variant", ["eva", "eva_f"])
def test_the_report_says_why_a_parameter_has_no_vectors_and_it_follows_the_fallback(variant: Any) -> None:
    torch.manual_seed(0)
    model = _Zoo().double()
    optimizer = Eva(model.parameters(), lr=0.1, variant=variant, momentum=0).attach(model, skip=["skip*"])
    optimizer.zero_grad()
    loss_of(model, SEQUENCE.batch(0)).backward()
    before = weights(model)
    expected = {n: before[n] - 0.1 * p.grad for n, p in model.named_parameters()}  # type: ignore[operator]
    optimizer.step()
    report = optimizer.kv_report()
    assert {name for name, each in report.items() if not each.skipped} == {"own", "classes"}
    for name, reason in REASONS.items():
        assert report[name].skipped == reason
        assert report[name].rho is None
    for name, value in weights(model).items():
        if name.partition(".")[0] in ("own", "classes"):
            assert relative_difference(value, expected[name]) > 1e-6
        else:
            assert relative_difference(value, expected[name]) < 1e-13
    assert set(report) - {"own", "classes"} == {n for n in before if n.partition(".")[0] not in ("own", "classes")}


def test_the_report_has_the_share_that_is_removed_and_the_norms() -> None:
    model = CONV.net()
    optimizer = Eva(model.parameters(), damping=0.2, **STRONG).attach(model)
    assert not any(each.rho for each in optimizer.kv_report().values())
    train(model, optimizer, CONV, 1)
    report = optimizer.kv_report()["6"]
    state = optimizer.state[model[6].weight]
    alpha, beta = state["kv_a"].square().sum().item() + 1, state["kv_g"].square().sum().item()
    assert report.a_norm == pytest.approx(alpha**0.5)
    assert report.g_norm == pytest.approx(beta**0.5)
    assert report.rho == pytest.approx(alpha * beta / (0.2 + alpha * beta))
    # In front of batch norm, the gradients of a full batch cancel.
    assert (optimizer.kv_report()["0"].rho or 0.0) < 1e-20


def test_eva_s_needs_no_module_and_treats_every_tensor_of_two_axes_or_more() -> None:
    ends = []
    for attach in (False, True):
        model = SEQUENCE.net()
        optimizer = Eva(model.parameters(), variant="eva_s")
        if attach:
            optimizer.attach(model)
        train(model, optimizer, SEQUENCE, 4)
        ends.append(weights(model))
        assert [p.ndim for p in model.parameters() if "kv_a" in optimizer.state[p]] == [2, 2, 2]
    equal(ends[0], ends[1])


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (0, 2, 1)], ids=str)
def test_eva_s_updates_a_tensor_in_any_memory_order(order: tuple[int, ...]) -> None:
    """By its own rule where the memory is that of a matrix, else by the fallback; never not at all."""
    grad = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    back = [order.index(i) for i in range(3)]
    plain = nn.Parameter(torch.zeros(4, 3, 2, dtype=torch.float64))
    other = nn.Parameter(torch.zeros(4, 3, 2, dtype=torch.float64).permute(order).contiguous().permute(back))
    is_channels_last = order == (0, 2, 1)
    expected = Eva([plain], variant="eva_s") if is_channels_last else torch.optim.SGD([plain], lr=0.1, momentum=0.9)
    actual = Eva([other], variant="eva_s")
    for _ in range(2):
        plain.grad, other.grad = grad.clone(), grad.clone()
        expected.step()
        actual.step()
    assert plain.any()
    torch.testing.assert_close(other.detach().contiguous(), plain.detach(), rtol=1e-13, atol=1e-15)


# ---- sums and rows that users know -----------------------------------------------------------------------------------


def test_zero_grad_forgets_what_was_captured() -> None:
    ends = []
    for extra in (False, True):
        model = MLP.net()
        optimizer = Eva(model.parameters(), **STRONG).attach(model)
        if extra:
            loss_of(model, MLP.batch(9)).backward()
        train(model, optimizer, MLP, 2)
        ends.append(weights(model))
    equal(*ends)


def test_the_capture_survives_a_zero_grad_between_forward_and_backward() -> None:
    """The order of Lightning's closure."""
    ends = []
    for between in (False, True):
        model = MLP.net()
        optimizer = Eva(model.parameters(), **STRONG).attach(model)
        for step in range(3):
            if not between:
                optimizer.zero_grad()
            loss = loss_of(model, MLP.batch(step))
            if between:
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append(weights(model))
    equal(*ends)


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned() -> None:
    ends = []
    for use in (False, True):
        model = MLP.net()
        optimizer = Eva(model.parameters(), **STRONG).attach(model)

        def closure(model: nn.Module = model, optimizer: Eva = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, MLP.batch(0))
            loss.backward()
            return loss

        if use:
            assert optimizer.step(closure) == loss_of(MLP.net(), MLP.batch(0))
        else:
            closure()
            optimizer.step()
        ends.append(weights(model))
    equal(*ends)


def test_rows_that_a_loss_ignores_count_among_the_inputs() -> None:
    layer = nn.Linear(6, 4).double()
    optimizer = Eva(layer.parameters(), kv_samples=None).attach(layer)
    x, y = MLP.batch(0)
    F.cross_entropy(layer(x), y.masked_fill(y == 0, -100)).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[layer.weight]["kv_a"], x.mean(0), rtol=1e-12, atol=1e-15)
