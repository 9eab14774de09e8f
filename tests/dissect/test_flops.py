"""Counted operations equal those of the formulas, by phase and by module; nothing else changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lightning_efficient.dissect import FlopCount, ModuleFlops
from lightning_efficient.models import LLAMA_PRESETS, Llama, LlamaConfig


def llama_flops(config: LlamaConfig, batch: int, length: int) -> int:
    """Six per weight and token, apart from the embedding's; attention's four products, three times."""
    D, kv = config.hidden_size, config.kv_heads * config.head_size
    weights = config.num_layers * (2 * D * D + 2 * D * kv + 3 * D * config.ffn_size) + D * config.vocab_size
    return batch * (6 * weights * length + 12 * config.num_layers * D * length**2)


def small(attention: str, *, recompute: bool = False) -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(256, 64, 176, 2, 4, 2, max_seq_len=32, attention=attention)  # type: ignore[arg-type]
    return Llama(config, activation_checkpointing=recompute)


def loss_of(model: nn.Module, batch: int = 2, length: int = 32, vocab: int = 256) -> Tensor:
    ids = torch.arange(batch * length).view(batch, length) % vocab
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def hooks_of(model: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())


def count_step(model: nn.Module, *shape: int) -> FlopCount:
    with FlopCount(model) as count:
        loss_of(model, *shape).backward()
    return count


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("input_grad", "weight_grad"), [(True, True), (True, False), (False, True)])
def test_a_linear_costs_2nab_forward_and_2nab_per_gradient(bias: bool, input_grad: bool, weight_grad: bool) -> None:
    n, a, b = 6, 5, 3
    layer = nn.Linear(a, b, bias=bias)
    layer.weight.requires_grad_(weight_grad)

    with FlopCount(layer) as count:
        layer(torch.randn(n, a, requires_grad=input_grad)).sum().backward()

    assert count.forward == 2 * n * a * b
    assert count.backward == 2 * n * a * b * (input_grad + weight_grad)
    assert count.recompute == 0


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_equals_its_closed_form(attention: str, recompute: bool) -> None:
    model = small(attention, recompute=recompute)

    count = count_step(model)

    assert count.model_flops == llama_flops(model.config, 2, 32)
    assert count.forward * 2 == count.backward
    assert sum(each.total for each in count.by_module().values()) == count.total == count.hardware_flops


@pytest.mark.parametrize(("attention", "again"), [("sdpa", 1.2588), ("eager", 1.2555)])
def test_llama_7b_without_memory(attention: str, again: float) -> None:
    with FakeTensorMode():
        config = LlamaConfig(**LLAMA_PRESETS["7b"], attention=attention)
        count = count_step(Llama(config, activation_checkpointing=True), 1, 512, 32_000)

    assert count.model_flops == llama_flops(config, 1, 512)
    # Less than 4/3: a layer's last product and the head do not run again; fused attention repeats its scores.
    assert count.hardware_flops / count.model_flops == pytest.approx(again, abs=1e-4)


def test_modules_have_what_their_shapes_say() -> None:
    model = small("eager", recompute=True)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)

    modules = count_step(model).by_module()

    product = 2 * 2 * 32 * 64 * 176
    scores = 2 * 2 * 32 * 32 * 64
    assert modules["model.layers.1.mlp.gate_proj"] == ModuleFlops(product, product, 2 * product)
    assert modules["model.layers.1.mlp.down_proj"] == ModuleFlops(product, 0, 2 * product)  # nobody needs its output
    assert modules["model.layers.0.mlp.up_proj"] == ModuleFlops(product, product, product)
    assert modules["model.layers.0.self_attn"] == ModuleFlops(2 * scores, 2 * scores, 4 * scores)
    assert modules["lm_head"] == ModuleFlops(2 * 64 * 64 * 256, 0, 4 * 64 * 64 * 256)


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        y: Tensor = self.last(x)
        return y


@pytest.mark.parametrize("reentrant", [True, False])
def test_both_kinds_of_checkpointing_add_recomputation_alone(reentrant: bool) -> None:
    x = torch.randn(5, 8)
    counts = []
    for kind in (None, reentrant):
        model = Checkpointed(reentrant=kind)
        with FlopCount(model) as count:
            model(x).sum().backward()
            model(x).sum().backward()
        counts.append(count)
    plain, repeated = (count.by_module() for count in counts)

    assert counts[0].recompute == 0
    assert counts[0].model_flops == counts[1].model_flops
    assert set(plain) == set(repeated) == {"first", "last"} | {f"blocks.{i}.{j}" for i in range(3) for j in (0, 2)}
    for path, flops in plain.items():
        # The reentrant kind runs the whole block again, the other stops at the last tensor that is needed.
        again = path.startswith("blocks") and (reentrant or path.endswith(".0"))
        assert repeated[path] == ModuleFlops(flops.forward, flops.forward if again else 0, flops.backward), path


def test_a_step_has_the_same_loss_and_gradients_when_counted_and_leaves_nothing() -> None:
    results = []
    for counted in (False, True):
        model = small("sdpa", recompute=True)
        if counted:
            with FlopCount(model):
                loss = loss_of(model)
                loss.backward()
        else:
            loss = loss_of(model)
            loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])

    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert hooks_of(model) == 0


def test_nothing_stays_after_a_failure() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))
    count = FlopCount(model)

    with pytest.raises(RuntimeError, match="mat1 and mat2"), count:
        model(torch.ones(2, 4))

    assert hooks_of(model) == 0
    before = count.total
    model[0](torch.ones(2, 4))
    assert count.total == before == 2 * 2 * 4 * 4


def conv(**options: int) -> nn.Module:
    return nn.Conv2d(8, 16, 3, padding=1, **options)


@pytest.mark.parametrize(
    ("layer", "forward"),
    [
        (conv(), 2 * 2 * 6 * 6 * 16 * 8 * 9),
        (conv(stride=2), 2 * 2 * 3 * 3 * 16 * 8 * 9),
        (conv(groups=4), 2 * 2 * 6 * 6 * 16 * 2 * 9),
        (nn.ConvTranspose2d(8, 16, 3, stride=2), 2 * 2 * 6 * 6 * 16 * 8 * 9),
    ],
)
def test_convolutions_cost_their_window_per_output_and_twice_that_in_backward(layer: nn.Module, forward: int) -> None:
    with FlopCount(layer) as count:
        layer(torch.randn(2, 8, 6, 6, requires_grad=True)).sum().backward()

    assert (count.forward, count.backward) == (forward, 2 * forward)


@pytest.mark.parametrize("build", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_cost_their_matrices_per_step(build: type[nn.RNNBase]) -> None:
    rnn = build(7, 5, num_layers=2, batch_first=True)
    matrices = sum(each.numel() for name, each in rnn.named_parameters() if name.startswith("weight"))

    with FlopCount(rnn) as count:
        rnn(torch.randn(3, 4, 7, requires_grad=True))[0].sum().backward()

    assert count.forward == 2 * 3 * 4 * matrices
    # The first step's state is zeros and needs no gradient; only layers that run step by step can leave it out.
    assert 2 * count.forward * (1 - 1 / 4) <= count.backward <= 2 * count.forward


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "MATH"])
def test_fused_attention_counts_like_its_formula(backend: str) -> None:
    q, k, v = (torch.randn(2, 4, length, 8, requires_grad=True) for length in (6, 10, 10))
    which = getattr(torch.nn.attention.SDPBackend, backend)

    with FlopCount(nn.Identity()) as count, torch.nn.attention.sdpa_kernel(which):
        F.scaled_dot_product_attention(q, k, v).sum().backward()

    product = 2 * 2 * 4 * 6 * 10 * 8
    assert (count.forward, count.backward) == (2 * product, 4 * product)
    assert count.recompute == (product if backend == "FLASH_ATTENTION" else 0)


def test_inference_mode_is_counted() -> None:
    model = small("sdpa")
    with torch.inference_mode(), FlopCount(model) as count:
        loss_of(model)

    assert 3 * count.total == llama_flops(model.config, 2, 32)


def test_compiled_parts_run_uncompiled_while_counting() -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 4), backend="eager"))

    with FlopCount(model) as count:
        model(torch.ones(2, 4)).sum().backward()

    product = 2 * 2 * 4 * 4
    assert count.by_module() == {"1": ModuleFlops(product, 0, 2 * product), "0": ModuleFlops(product, 0, product)}


def test_operators_of_other_libraries_are_named() -> None:
    @torch.library.custom_op("le_flops_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    with FlopCount(nn.Identity()) as count:
        double(torch.ones(2))

    assert count.uncounted == {"le_flops_test.double"}
