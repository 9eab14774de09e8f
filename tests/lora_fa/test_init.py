"""How A is drawn: orthonormal, the same on every machine, and along the directions it is named after."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa, calibrate, orthonormalize
from lightning_efficient.lora_fa.frozen import compressed, dense
from lightning_efficient.lora_fa.init import orthonormal_rows
from lightning_efficient.lora_fa.inject import adapted_layers
from lightning_efficient.lora_fa.state import A_fingerprints
from tests.lora_fa.nets import TARGETS, adapted_block, block, fill_B, normal, quantised

K, N, R, T = 48, 40, 6, 400
BACKENDS = ["native", "peft"]


def A_of(layer: Any, name: str = "default") -> Tensor:
    A: Tensor = layer.lora_A[name].weight.detach().double()
    return A


def off_orthonormal(A: Tensor) -> float:
    return float((A @ A.t() - torch.eye(len(A), dtype=A.dtype)).abs().max())


def decaying(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix with the spectrum of activations and gradients, which falls as a power."""
    U, _, V = torch.linalg.svd(normal(rows, columns, seed=seed), full_matrices=False)
    return U @ torch.diag(torch.arange(1, len(V) + 1, dtype=torch.float64) ** -0.7) @ V


def energy(matrix: Tensor, A: Tensor) -> float:
    """The part of the best rank-R energy of ``matrix`` (..., K) that the rows of A hold."""
    best = torch.linalg.svdvals(matrix)[: len(A)].square().sum()
    return float((matrix @ A.t()).square().sum() / best)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("init", ["orthogonal", "pissa", "eva", "gradient"])
def test_rows_are_orthonormal(backend: str, init: Any) -> None:
    model = adapted_block(init=init, backend=backend)

    for layer in adapted_layers(model).values():
        assert off_orthonormal(A_of(layer)) < 1e-6


@pytest.mark.parametrize("init", ["orthogonal", "kaiming", "gaussian", "pissa"])
def test_A_depends_on_the_seed_and_the_name_alone(init: Any) -> None:
    fingerprints = []
    for global_seed, seed in ((0, 3), (1, 3), (1, 4)):
        model = block()
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        apply_lora_fa(model, LoRAFAConfig(target_modules=TARGETS, r=4, init=init, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        fingerprints.append(A_fingerprints(model))

    assert fingerprints[0] == fingerprints[1]
    if init != "pissa":  # its directions are those of the weight, whatever it starts from
        assert all(fingerprints[0][name] != value for name, value in fingerprints[2].items())


def test_backends_draw_the_same_A_and_layers_different_ones() -> None:
    native, peft = (A_fingerprints(adapted_block(backend=backend)) for backend in BACKENDS)
    square = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_lora_fa(square, LoRAFAConfig(r=4))

    assert native == peft
    assert len(set(A_fingerprints(square).values())) == 2


@pytest.mark.parametrize(("init", "std"), [("kaiming", 1 / math.sqrt(3 * K)), ("gaussian", 1 / 8)])
def test_random_rows_have_pefts_spread(init: Any, std: float) -> None:
    model = nn.Sequential(nn.Linear(K, 400))
    apply_lora_fa(model, LoRAFAConfig(r=8, init=init))
    A = A_of(model[0])

    assert abs(float(A.std()) / std - 1) < 0.15  # of 384 numbers
    if init == "kaiming":
        assert float(A.abs().max()) <= 1 / math.sqrt(K)
        assert float(A.abs().max()) > 0.95 / math.sqrt(K)


@pytest.mark.parametrize("base", ["float32", "bfloat16", "nf4", "int8"])
def test_pissa_takes_the_leading_directions_of_the_weight_and_leaves_it(base: str) -> None:
    weight = decaying(N, K).float()
    linear: nn.Module = nn.Linear(K, N, bias=False)
    linear.weight = nn.Parameter(weight.clone())
    linear = quantised(base, weight) if base in ("nf4", "int8") else linear.to(getattr(torch, base))
    model = nn.Sequential(linear)
    before = linear.weight.detach().clone()
    apply_lora_fa(model, LoRAFAConfig(r=R, init="pissa"))
    ordinary, other = dense(linear), compressed(linear)
    stored = ordinary.weight if ordinary is not None else other.weight(torch.float32)

    assert energy(stored.detach().double(), A_of(model[0])) > 0.99
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eva_takes_the_leading_directions_of_the_inputs(backend: str) -> None:
    model = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, N))
    batches = [part.float() * 10 for part in decaying(T, K).chunk(4)]
    with torch.no_grad():
        inner = [model[1](model[0](batch)).double() for batch in batches]
        before = model(batches[0])
    apply_lora_fa(model, LoRAFAConfig(r=R, init="eva", backend=backend))

    def run() -> None:
        for batch in batches:
            model(batch)

    calibrate(model, run, method="eva")

    assert energy(torch.cat(batches).double(), A_of(model[0])) > 0.99
    assert energy(torch.cat(inner), A_of(model[2])) > 0.99
    assert all(off_orthonormal(A_of(layer)) < 1e-5 for layer in adapted_layers(model).values())
    torch.testing.assert_close(model(batches[0]), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_takes_the_leading_directions_of_the_summed_gradient(backend: str) -> None:
    model = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, N))
    batches, goals = decaying(T, K).float().chunk(4), decaying(T, N, seed=1).float().chunk(4)

    def run() -> None:
        for x, goal in zip(batches, goals, strict=True):
            (model(x * 10) - goal * 10).square().sum().backward()

    run()
    exact = [model[i].weight.grad.double() for i in (0, 2)]
    model.zero_grad(set_to_none=True)
    apply_lora_fa(model, LoRAFAConfig(r=R, init="gradient", backend=backend))
    calibrate(model, run, method="gradient")

    for index, gradient in zip((0, 2), exact, strict=True):
        assert energy(gradient, A_of(model[index])) > 0.99
        assert off_orthonormal(A_of(model[index])) < 1e-5


@pytest.mark.parametrize("method", ["eva", "gradient"])
def test_two_ranks_calibrate_as_one_process_with_both_batches(method: Any) -> None:
    """The sum over ranks is played by running the other rank's batch into a second model."""
    batches = [decaying(T, 12, seed=seed).float() * 10 for seed in (0, 1)]

    def pass_over(model: nn.Module, some: list[Tensor]) -> None:
        for x in some:
            model(x).square().sum().backward()

    one = adapted_block(init=method)
    with torch.no_grad():
        for layer in adapted_layers(one).values():
            layer.lora_B["default"].weight.zero_()
    first, second = copy.deepcopy(one), copy.deepcopy(one)
    calibrate(one, lambda: pass_over(one, batches), method=method)
    sums: list[Tensor] = []
    # The second rank's own sums, pass by pass, need the first's: both see the sum of both.
    calibrate(second, lambda: pass_over(second, batches), method=method, reduce=lambda t: sums.append(t.clone()) or t)
    taken = iter(sums)
    calibrate(first, lambda: pass_over(first, batches[:1]), method=method, reduce=lambda t: next(taken))

    assert A_fingerprints(first) == A_fingerprints(second) == A_fingerprints(one)


def fresh() -> nn.Module:
    model = block()
    apply_lora_fa(model, LoRAFAConfig(target_modules=TARGETS, r=4, init="eva"))
    return model


def test_calibration_refuses_what_says_nothing() -> None:
    x = normal(30, 12, dtype=torch.float32)
    for run, said in (
        (lambda m: None, "No calibration batch reached 'first'"),
        (lambda m: m(x * float("nan")), "not finite"),
        (lambda m: m(x[:2]), "2 rows for its rank 4"),
    ):
        model = fresh()
        A = A_fingerprints(model)
        with pytest.raises(ValueError, match=said):
            calibrate(model, lambda m=model, run=run: run(m), method="eva")
        assert A_fingerprints(model) == A
        assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in adapted_layers(model).values())


def test_calibration_without_backward_is_noticed() -> None:
    model = fresh()

    def forward() -> None:
        model(normal(30, 12, dtype=torch.float32))

    with pytest.raises(ValueError, match="No calibration batch reached 'first'"):
        calibrate(model, forward, method="gradient")


def test_calibration_refuses_a_trained_B() -> None:
    model = fill_B(fresh())

    with pytest.raises(ValueError, match="'first' was trained already"):
        calibrate(model, lambda: None, method="eva")


def test_an_exception_in_the_batches_leaves_no_hook() -> None:
    model = fresh()
    with pytest.raises(ZeroDivisionError):
        calibrate(model, lambda: 1 / 0, method="gradient")

    assert not any(layer._forward_hooks for layer in adapted_layers(model).values())


@pytest.mark.parametrize("A", [torch.zeros(2, 4), torch.ones(2, 4), torch.full((2, 4), float("nan"))])
def test_dependent_rows_are_refused(A: Tensor) -> None:
    with pytest.raises(ValueError, match="linearly dependent"):
        orthonormal_rows(A)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_orthonormalize_keeps_the_outputs(backend: str, init: Any) -> None:
    model = adapted_block(dtype=torch.float64, init=init, backend=backend)
    x = normal(7, 12)
    before = model(x)
    orthonormalize(model)

    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert all(off_orthonormal(A_of(layer)) < 1e-12 for layer in adapted_layers(model).values())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"{n}.lora_B.default.weight" for n in TARGETS
    ]


def test_calibration_under_autocast_adds_up_in_float32() -> None:
    def A(autocast: bool) -> Tensor:
        model, x = fresh(), normal(300, 12, dtype=torch.float32)

        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(x)

        calibrate(model, run, method="eva")
        return A_of(adapted_layers(model)["first"])  # its input is x, whatever the model computes in

    torch.testing.assert_close(A(True), A(False), rtol=1e-4, atol=1e-5)
