"""What a user gets told when something cannot work, and that nothing is left behind."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.optimizers import Eva
from tests.eva.nets import MLP, SEQUENCE, equal, loss_of, train, weights

# ---- at construction -------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "damping 0": ({"damping": 0.0}, r"damping is 0.0: the curvature has rank 1.*Set it above 0"),
    "damping nan": ({"damping": float("nan")}, "damping is nan"),
    "negative kl_clip": ({"kl_clip": -1.0}, r"kl_clip is -1.0: .*must be above 0. Set None for no clip"),
    "kl_clip 0": ({"kl_clip": 0.0}, "kl_clip is 0.0"),
    "kv_new_weight 0": ({"kv_new_weight": 0.0}, r"kv_new_weight is 0.0: .*in \(0, 1\]"),
    "kv_new_weight 1.5": ({"kv_new_weight": 1.5}, "kv_new_weight is 1.5"),
    "kv_samples": ({"kv_samples": 0}, "kv_samples is 0: it counts samples. Set 1 or more, or None for all"),
    "kv_every": ({"kv_every": 0}, "kv_every is 0: it counts steps"),
    "variant": ({"variant": "evas"}, "variant is 'evas': there is no such variant. Use one of eva, eva_f, eva_s"),
    "backend": ({"backend": "cuda"}, "backend is 'cuda': .*eager, compiled, triton"),
    "rescale": ({"rescale": "kl"}, "rescale is 'kl': .*clip, normalize, match_grad, graft, none"),
    "g_scale": ({"g_scale": "mean"}, "g_scale is 'mean': .*reference, expectation"),
    "damping_mode": ({"damping_mode": "abs"}, "damping_mode is 'abs': .*absolute, relative"),
    "fallback": ({"fallback": "adam"}, "fallback is 'adam': .*sgd, adamw"),
    "lr": ({"lr": -0.1}, "lr is -0.1: .*uphill"),
    "momentum": ({"momentum": 1.0}, r"momentum is 1.0: .*in \[0, 1\)"),
    "nesterov": ({"nesterov": True, "momentum": 0.0}, "nesterov=True with momentum 0"),
    "weight_decay": ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    "fallback_lr": ({"fallback_lr": 0.1, "lr": 0.0}, "fallback_lr is 0.1 with lr 0.0: its ratio to lr is kept"),
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_setting_out_of_range_is_refused_at_once(setting: str) -> None:
    settings, message = WRONG[setting]
    with pytest.raises(ValueError, match=message):
        Eva(nn.Linear(3, 2).parameters(), **settings)


def test_a_setting_of_a_group_is_checked_too() -> None:
    with pytest.raises(ValueError, match="damping is 0"):
        Eva([{"params": nn.Linear(3, 2).parameters(), "damping": 0.0}])


def test_parameters_that_no_rule_can_update_are_refused() -> None:
    with pytest.raises(TypeError, match=r"shape \(2, 3\) is complex: .*an optimizer of its own"):
        Eva([nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64))])
    with pytest.raises(TypeError, match=r"lr is a Tensor: .* takes a number. Pass float\(lr\)"):
        Eva(nn.Linear(3, 2).parameters(), lr=torch.tensor(0.1))  # type: ignore[arg-type]

    class FlatParameter(nn.Parameter):
        pass

    with pytest.raises(NotImplementedError, match=r"FlatParameter, a shard of a weight .*strategy='ddp'"):
        Eva([FlatParameter(torch.zeros(6))])


@pytest.mark.distributed
def test_a_dtensor_is_refused() -> None:
    from tests.support.ranks import run_ranks

    assert "a shard of a weight" in run_ranks(_dtensor, 1)[0]


def _dtensor(rank: int, world_size: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    p = nn.Parameter(distribute_tensor(torch.zeros(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)]))
    try:
        Eva([p])
    except NotImplementedError as error:
        return str(error)
    return "accepted"


# ---- attach ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["eva", "eva_f"])
def test_a_step_without_attach_says_how_to(variant: Any) -> None:
    model = MLP.net()
    optimizer = Eva(model.parameters(), variant=variant)
    loss_of(model, MLP.batch(0)).backward()
    before = weights(model)
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    assert str(error.value) == (
        f"Eva(variant='{variant}') needs layer inputs: call optimizer.attach(model) or add AttachOptimizer to "
        "Trainer(callbacks=...)."
    )
    equal(weights(model), before)


def test_another_module_is_refused_while_one_is_attached() -> None:
    model = MLP.net()
    optimizer = Eva(model.parameters()).attach(model)
    with pytest.raises(ValueError, match=r"attached to another module already: .*Call detach\(\) first"):
        optimizer.attach(nn.Sequential(model))
    train(model, optimizer, MLP, 1)


def test_a_module_without_any_of_the_weights_is_refused_with_counts() -> None:
    model = MLP.net()
    optimizer = Eva(model.parameters())
    with pytest.raises(ValueError, match=r"None of the 5 parameters .*whose 2 parameters lie in LayerNorm"):
        optimizer.attach(nn.Sequential(nn.LayerNorm(3)))
    assert not optimizer.attached


def test_a_pattern_that_skips_nothing_is_refused() -> None:
    model = MLP.net()
    with pytest.raises(ValueError, match=r"skip has 'lm_head': no module has such a name.*names here are 0, 1, 2"):
        Eva(model.parameters()).attach(model, skip=["lm_head"])
    with pytest.raises(TypeError, match=r"skip is the string '4': .*Write \['4'\]"):
        Eva(model.parameters()).attach(model, skip="4")


def test_a_refused_attach_leaves_no_hooks() -> None:
    model = MLP.net()
    with pytest.raises(ValueError, match="no module has such a name"):
        Eva(model.parameters()).attach(model, skip=["nothing"])
    other = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7, bias=False), nn.Tanh(), nn.Linear(7, 4)).double()
    saved = Eva(other.parameters(), momentum=0.0).attach(other)
    train(other, saved, MLP, 1)
    optimizer = Eva(model.parameters(), momentum=0.0)
    optimizer.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="of another model"):
        optimizer.attach(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_weights_on_two_devices_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    with pytest.raises(NotImplementedError, match=r"lie on cpu, meta: .*on one device"):
        Eva(model.parameters()).attach(model)


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_a_sparse_gradient_is_refused_by_its_name() -> None:
    model = nn.Sequential(nn.Embedding(11, 8, sparse=True), nn.Linear(8, 4)).double()
    optimizer = Eva(model.parameters()).attach(model)
    loss_of(model, SEQUENCE.batch(0)).backward()
    with pytest.raises(TypeError, match=r"gradient of 0.weight is sparse: .*sparse=False"):
        optimizer.step()


class _Bypassed(nn.Module):
    """Uses the weight of one layer without calling it, from the second forward pass on if ``late``."""

    def __init__(self, late: int = 0) -> None:
        super().__init__()
        self.first, self.second, self.calls, self.late = nn.Linear(6, 5), nn.Linear(5, 4), 0, late

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x)
        if self.calls <= self.late:
            return x[:, :4]
        return F.linear(x, self.second.weight, self.second.bias)


@pytest.mark.parametrize("late", [0, 1])
def test_a_layer_with_a_gradient_but_no_vectors_is_named_with_the_causes(late: int) -> None:
    model = _Bypassed(late).double()
    optimizer = Eva(model.parameters()).attach(model)
    train(model, optimizer, MLP, late)
    with pytest.raises(RuntimeError) as error:
        train(model, optimizer, MLP, 1)
    message = str(error.value)
    assert message.startswith("The layers second have gradients but no Kronecker vectors")
    for words in (
        "attach() came after the first call of the compiled model",
        "torch.autograd.grad computed the gradients (use backward)",
        "the module was in eval mode",
        "attach(model, skip=['second'])",
    ):
        assert words in message


def test_a_layer_that_lost_its_vectors_in_a_step_without_capture_is_named_at_the_next_capture() -> None:
    model = _Bypassed(late=1).double()
    optimizer = Eva(model.parameters(), kv_every=2).attach(model)
    with pytest.raises(RuntimeError, match="The layers second have gradients but no Kronecker vectors"):
        train(model, optimizer, MLP, 3)


def test_a_model_that_was_compiled_before_attach_is_refused() -> None:
    torch.compiler.reset()
    model = MLP.net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(compiled, MLP.batch(0))  # type: ignore[arg-type]
    optimizer = Eva(model.parameters()).attach(model)
    loss_of(compiled, MLP.batch(0)).backward()  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="The layers 0, 2, 4 have gradients but no Kronecker vectors"):
        optimizer.step()


def test_a_skipped_layer_follows_the_fallback_rule_and_needs_no_vectors() -> None:
    model = _Bypassed().double()
    optimizer = Eva(model.parameters(), momentum=0.0).attach(model, skip=["sec*"])
    before = weights(model)
    train(model, optimizer, MLP, 1)
    grad = model.second.weight.grad
    assert grad is not None
    torch.testing.assert_close(model.second.weight.detach(), before["second.weight"] - 0.1 * grad, rtol=1e-13, atol=0)
    assert optimizer.kv_report()["second.weight"].skipped == "skip has 'sec*'"
