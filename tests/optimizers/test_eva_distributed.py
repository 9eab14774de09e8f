"""Two ranks equal one process on the joined batch, by one all-reduce for each step."""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient.optimizers import Eva
from tests.eva.nets import MLP, SEQUENCE, equal, gradients, loss_of, relative_difference, weights
from tests.support.collectives import count_collectives
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS, ROWS = 12, 16

SETTINGS: dict[str, dict[str, Any]] = {
    "eva": {"g_scale": "expectation", "kv_samples": None, "kv_new_weight": 0.5},
    "eva_f": {"variant": "eva_f", "kv_samples": None, "rescale": "clip", "fallback": "adamw", "fallback_lr": 0.01},
    "eva_s": {"variant": "eva_s"},
    "every second step": {"g_scale": "expectation", "kv_samples": None, "kv_every": 2},
    "published": {},
}


def _slice(batch: tuple[Tensor, Tensor], part: int, parts: int) -> tuple[Tensor, Tensor]:
    x, y = batch
    rows = len(x) // parts
    return x[part * rows : (part + 1) * rows], y[part * rows : (part + 1) * rows]


def _train(rank: int, world_size: int, settings: dict[str, Any], micro: int = 1) -> dict[str, Any]:
    """Each step on ``micro`` micro-batches of this rank's share; plain for one rank."""
    model = SEQUENCE.net()
    net: Any = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = Eva(model.parameters(), lr=0.1, **settings).attach(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        share = _slice(SEQUENCE.batch(step, ROWS), rank, world_size)
        for part in range(micro):
            quiet = net.no_sync() if world_size > 1 and part < micro - 1 else nullcontext()
            with quiet:
                (loss_of(net, _slice(share, part, micro)) / micro).backward()
        optimizer.step()
    return {"weights": weights(model), "state": optimizer.state_dict()["state"], "gradients": gradients(model)}


def _every_setting(rank: int, world_size: int) -> dict[str, Any]:
    return {
        name: {micro: _train(rank, world_size, settings, micro) for micro in (1, 2)}
        for name, settings in SETTINGS.items()
    }


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    """Results by rank, setting and number of micro-batches."""
    return run_ranks(_every_setting, 2)


# 12 steps in another order of sums leave 1e-13 at most.


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "published"])
def test_ranks_equal_one_process_on_the_joined_batch(runs: Any, setting: str, micro: int) -> None:
    one = _train(0, 1, SETTINGS[setting])
    for result in runs:
        assert relative_difference(result[setting][micro]["weights"], one["weights"]) < 1e-11


@pytest.mark.parametrize("setting", SETTINGS)
def test_replicas_are_bit_identical_with_their_states(runs: Any, setting: str) -> None:
    for micro in (1, 2):
        equal(runs[1][setting][micro]["weights"], runs[0][setting][micro]["weights"])
        equal(runs[1][setting][micro]["state"], runs[0][setting][micro]["state"])


@pytest.mark.parametrize("micro", [2, 4, 8])
@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "published"])
def test_accumulated_micro_batches_equal_one_batch(setting: str, micro: int) -> None:
    accumulated, one = _train(0, 1, SETTINGS[setting], micro), _train(0, 1, SETTINGS[setting])
    assert relative_difference(accumulated["weights"], one["weights"]) < 1e-11


def _last_vectors(rank: int, world_size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The output vectors of one step beside the reduced gradients of the biases."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 4, 1, groups=2), nn.ReLU(True), nn.Flatten(), nn.Linear(4, 4)).double()
    net = DistributedDataParallel(model)
    optimizer = Eva(model.parameters(), lr=0.1, kv_samples=None, g_scale="expectation", kv_new_weight=1).attach(model)
    x, y = _slice(MLP.batch(0, ROWS), rank, world_size)
    loss_of(net, (x[..., None], y)).backward()
    biases = {i: model[i].bias.grad.clone() for i in (0, 3)}
    optimizer.step()
    return {str(i): (optimizer.state[model[i].weight]["kv_g"], bias) for i, bias in biases.items()}


def test_g_is_the_reduced_gradient_of_the_bias() -> None:
    for result in run_ranks(_last_vectors, 2):
        for g, bias in result.values():
            torch.testing.assert_close(g, bias, rtol=1e-12, atol=1e-15)


# ---- collectives -----------------------------------------------------------------------------------------------------


def _collectives(rank: int, world_size: int) -> dict[str, dict[str, Counter[str]]]:
    """What a step of three micro-batches sends: in its quiet micro-steps, its last, and in ``optimizer.step``."""
    makers: dict[str, Any] = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1)}
    makers.update({name: lambda p, s=s: Eva(p, **s) for name, s in SETTINGS.items()})
    seen = {}
    for name, make in makers.items():
        model = SEQUENCE.net()
        net = DistributedDataParallel(model)
        optimizer = make(model.parameters())
        if isinstance(optimizer, Eva):
            optimizer.attach(model)
        parts = {}
        for step in range(4):
            optimizer.zero_grad()
            batch = _slice(SEQUENCE.batch(step, ROWS), rank, world_size)
            with count_collectives() as quiet, net.no_sync():
                for _ in range(2):
                    loss_of(net, batch).backward()
            with count_collectives() as last:
                loss_of(net, batch).backward()
            with count_collectives() as own:
                optimizer.step()
            parts[f"{step}"] = {"quiet": quiet, "last": last, "step": own}
        seen[name] = {s: {k: Counter(c.op for c in v) for k, v in each.items()} for s, each in parts.items()}
    return seen  # type: ignore[return-value]


@pytest.fixture(scope="module")
def collectives() -> list[Any]:
    return run_ranks(_collectives, 2)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_sends_one_all_reduce_and_a_micro_step_none(collectives: Any, setting: str) -> None:
    for result in collectives:
        for step, seen in result[setting].items():
            plain = result["sgd"][step]
            # DDP itself agrees on its buckets once, in a forward pass.
            assert seen["quiet"] == plain["quiet"]
            assert seen["quiet"]["all_reduce"] == 0
            assert seen["last"] == plain["last"]
            captures = setting != "eva_s" and not (setting == "every second step" and int(step) % 2)
            assert seen["step"] == Counter({"all_reduce": 1} if captures else {})
            assert plain["step"] == Counter()


# ---- ranks that use different layers ---------------------------------------------------------------------------------


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor, right: bool) -> Tensor:
        return self.head((self.right if right else self.left)(x).tanh())


def _branches(rank: int, world_size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = _Branches().double()
    net = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = Eva(model.parameters(), lr=0.1, **SETTINGS["eva"]).attach(model)
    seen = []
    for step, used in enumerate([(False, True), (False, False), (True, False), (True, True)]):
        optimizer.zero_grad()
        x, y = _slice(MLP.batch(step, ROWS), rank, world_size)
        torch.nn.functional.cross_entropy(net(x, used[rank]), y).backward()
        with count_collectives() as own:
            optimizer.step()
        seen.append([(c.op, c.numel) for c in own])
    return {"weights": weights(model), "state": optimizer.state_dict()["state"], "sent": seen}


def test_ranks_that_use_different_layers_agree_on_what_is_sent_and_on_the_weights() -> None:
    first, second = run_ranks(_branches, 2)
    equal(second["weights"], first["weights"])
    equal(second["state"], first["state"])
    assert first["sent"] == second["sent"]
    assert len({tuple(each) for each in first["sent"]}) == 1
    assert [len(each) for each in first["sent"]] == [1] * 4
