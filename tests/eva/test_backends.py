"""The eager, the compiled and the Triton step are one method."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.optimizers import Eva
from tests.eva.nets import CONV, MLP, Task, equal, loss_of, relative_difference, train, weights

# Small steps, so that a net does not amplify the rounding of one to the next.
STRONG: dict[str, Any] = {"g_scale": "expectation", "kv_samples": None, "lr": 0.05, "kl_clip": 1e-4}

CASES: dict[str, tuple[Task, dict[str, Any]]] = {
    "eva": (CONV, STRONG),
    "eva_f without momentum": (CONV, {**STRONG, "variant": "eva_f", "momentum": 0.0, "weight_decay": 1e-2}),
    "eva_s": (CONV, {**STRONG, "variant": "eva_s"}),
    "nesterov": (CONV, {**STRONG, "nesterov": True, "weight_decay": 1e-2}),
    "decoupled nesterov": (
        MLP,
        {**STRONG, "nesterov": True, "weight_decay": 1e-2, "decoupled_weight_decay": True, "rescale": "match_grad"},
    ),
    "relative": (MLP, {**STRONG, "variant": "eva_f", "damping_mode": "relative", "rescale": "normalize"}),
    "two groups": (MLP, {**STRONG, "weight_decay": 1e-2}),
}  # fmt: skip
COMPILED = ["nesterov", "decoupled nesterov", "eva_f without momentum", "eva_s", "two groups"]
STEPS = 20
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

# The rounding of 20 steps with sums in another order, relative to the largest entry of each tensor: some ten times
# 1e-16 and 6e-8. In bfloat16 one step is compared: in a second one the net would amplify the rounding of the first. A
# fused step rounds a weight once, an eager one up to four times, by 2^-8 each.
TOLERANCE = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 5 * 2**-8}


class _Typed(nn.Module):
    """A net of another type between inputs and outputs of float64."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.dtype)).double()


def trained(case: str, backend: str, dtype: str) -> dict[str, Tensor]:
    """The weights after training."""
    task, settings = CASES[case]
    model = _Typed(task.net(), DTYPES[dtype])
    params: Any = list(model.parameters())
    if case == "two groups":
        params = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "damping": 0.1, "weight_decay": 0.0}]
    optimizer = Eva(params, backend=backend, **settings).attach(model)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    for step in range(1 if dtype == "bfloat16" else STEPS):
        train(model, optimizer, task, 1, first=step)
        schedule.step()
    return weights(model)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The final weights of all cases with the Triton kernels, from a process of its own."""
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("triton") / "weights.pt"
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.eva._interpreted", str(path)],
        cwd=root, capture_output=True, text=True, timeout=170, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(path, weights_only=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own
@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), [*((case, "float32") for case in COMPILED), ("two groups", "bfloat16")])
def test_the_compiled_step_equals_the_eager_one(case: str, dtype: str) -> None:
    actual, expected = (trained(case, backend, dtype) for backend in ("compiled", "eager"))
    assert relative_difference(actual, expected) < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_triton_step_equals_the_eager_one(case: str, dtype: str, interpreted: Any) -> None:
    assert relative_difference(interpreted[dtype][case], trained(case, "eager", dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", CASES)
def test_float32_follows_float64(case: str) -> None:
    wide, narrow = trained(case, "eager", "float64"), trained(case, "eager", "float32")
    # The gradients are rounded too: looser than between two backends.
    assert relative_difference({name: each.double() for name, each in narrow.items()}, wide) < 1e-5


def transposed_gradients(backend: str) -> dict[str, Tensor]:
    """The weights after steps on gradients that are laid out by column, as a hook may leave them."""
    model = MLP.net().float()
    optimizer = Eva(model.parameters(), backend=backend, variant="eva_f", **STRONG).attach(model)  # type: ignore[arg-type]
    for step in range(3):
        optimizer.zero_grad()
        x, labels = MLP.batch(step)
        loss_of(model, (x.float(), labels)).backward()
        for p in model.parameters():
            p.grad = p.grad.T.contiguous().T if p.ndim == 2 else p.grad  # type: ignore[union-attr]
        optimizer.step()
    return weights(model)


@pytest.mark.slow
def test_the_triton_step_reads_gradients_in_any_memory_order(interpreted: dict[str, dict[str, Tensor]]) -> None:
    assert relative_difference(interpreted["transposed"], transposed_gradients("eager")) < 1e-6


def test_triton_on_the_cpu_says_that_torchs_operations_run_and_runs_them() -> None:
    with pytest.warns(UserWarning, match=r"backend='triton' on the CPU.*torch's operations run instead") as seen:
        actual = trained("eva", "triton", "float32")
    assert len(seen) == 1
    equal(actual, trained("eva", "eager", "float32"))


def test_settings_that_one_kernel_cannot_mix_are_told_by_the_triton_step(interpreted: Any) -> None:
    message = interpreted["mixed groups"]
    assert "differ in whether they have momentum, nesterov or decoupled_weight_decay" in message
    assert "backend='eager'" in message


def mixed_groups(backend: str) -> str:
    """What a step says when one group has momentum and another has none; its weights are then as before."""
    model = MLP.net()
    before = weights(model)
    groups: Any = [{"params": model[0].parameters()}, {"params": [model[2].weight, *model[4].parameters()]}]
    optimizer = Eva([groups[0], {**groups[1], "momentum": 0.0}], backend=backend).attach(model)  # type: ignore[arg-type]
    try:
        train(model, optimizer, MLP, 1)
    except ValueError as error:
        equal(weights(model), before)
        return str(error)
    return "accepted"


def test_the_eager_step_mixes_groups_with_and_without_momentum() -> None:
    assert mixed_groups("eager") == "accepted"
