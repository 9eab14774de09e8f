"""What a step may cost: no wait for the device, no tensor of a weight's size beside the weights."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_efficient.optimizers import Eva
from tests.eva.nets import CONV, SEQUENCE, Task, loss_of, train

_WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "item")


class _Operations(TorchDispatchMode):
    """The names of the operations run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


SETTINGS: dict[str, dict[str, Any]] = {
    "eva": {},
    "eva, everything": {
        "g_scale": "expectation", "kv_samples": 8, "nesterov": True, "weight_decay": 0.1, "fallback": "adamw",
    },
    "eva_f": {"variant": "eva_f"},
    "eva_f, match_grad": {"variant": "eva_f", "rescale": "match_grad", "decoupled_weight_decay": True},
    "eva_f, relative": {"variant": "eva_f", "damping_mode": "relative", "rescale": "normalize"},
    "eva_s": {"variant": "eva_s"},
    "every second step": {"kv_every": 2},
}  # fmt: skip


@pytest.mark.parametrize("task", [CONV, SEQUENCE], ids=["conv", "3-d linear"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_never_waits_for_the_device(settings: str, task: Task) -> None:
    model = task.net()
    optimizer = Eva(model.parameters(), **SETTINGS[settings]).attach(model)
    optimizer.loss_scale = lambda: torch.ones(())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(model, optimizer, task, 1)
    for step in (1, 2):
        schedule.step()
        with _Operations() as seen:
            optimizer.zero_grad()
            loss_of(model, task.batch(step)).backward()
            loss_operations = len(seen.names)
            optimizer.step()
        assert len(seen.names) > loss_operations
        assert [name for name in seen.names if name in _WAITS] == []


def test_the_mode_would_see_a_wait() -> None:
    with _Operations() as seen:
        torch.ones(()).item()
    assert seen.names[-1] in _WAITS


@pytest.mark.parametrize("kind", ["linear", "grouped conv", "channels last"])
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"variant": "eva_f"}, {"variant": "eva_s"}, {"momentum": 0.0, "weight_decay": 0.1},
        {"nesterov": True, "weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_step_allocates_less_than_twice_the_largest_weight(settings: dict[str, Any], kind: str) -> None:
    torch.manual_seed(0)
    if kind == "linear":
        model: nn.Module = nn.Sequential(
            nn.Linear(256, 384), nn.Tanh(), nn.Linear(384, 512), nn.Tanh(), nn.Linear(512, 8)
        )
        x = torch.randn(16, 256)
    else:
        model = nn.Sequential(nn.Conv2d(64, 256, 3, groups=2), nn.Tanh(), nn.Conv2d(256, 64, 3), nn.Flatten())
        x = torch.randn(4, 64, 5, 5)
    if kind == "channels last":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    optimizer = Eva(model.parameters(), **settings).attach(model)
    for warm in (True, False):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if warm:
            optimizer.step()
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    before = sum(p.numel() for state in optimizer.state.values() for p in state.values())
    peak = _peak_bytes(optimizer.step)
    assert before == sum(p.numel() for state in optimizer.state.values() for p in state.values())
    assert peak < 2 * largest
    # Within the house: nothing of a weight's size at all, where gradients come in the memory order of their weights.
    assert peak < 0.5 * largest


def _peak_bytes(call: Any) -> int:
    """The most memory that is allocated at once during a call, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in seen.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    assert changes
    held = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        held += nbytes
        peak = max(peak, held)
    return peak


def test_the_profiler_would_see_a_weight() -> None:
    x = torch.ones(512, 512)
    assert _peak_bytes(lambda: x + 1) >= 4 * 512 * 512


def test_a_step_without_capture_runs_no_hook_work() -> None:
    model = SEQUENCE.net()
    optimizer = Eva(model.parameters(), kv_every=2).attach(model)
    counts = []
    for step in range(4):
        optimizer.zero_grad()
        with _Operations() as seen:
            loss_of(model, SEQUENCE.batch(step)).backward()
        counts.append(len(seen.names))
        optimizer.step()
    plain = SEQUENCE.net()
    with _Operations() as seen:
        loss_of(plain, SEQUENCE.batch(0)).backward()
    assert counts[1] == counts[3] == len(seen.names) < counts[0] == counts[2]
    assert optimizer.stats.kv_updates == 2
