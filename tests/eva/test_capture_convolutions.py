"""The captured a of any convolution is the mean of its patches, and g the gradient of its bias."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.eva.captured import Watch, agree
from tests.eva.reference import Use, kronecker_vectors

CONVS: list[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
GRID: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "stride": 2},
    "stride beyond the kernel": {"kernel_size": 2, "stride": 3},
    "padding": {"kernel_size": 3, "padding": 2},
    "dilation": {"kernel_size": 2, "dilation": 3},
    "all at once": {"kernel_size": 3, "stride": 2, "padding": 3, "dilation": 2},
    "same": {"kernel_size": 4, "padding": "same"},
    "same, dilated": {"kernel_size": 2, "padding": "same", "dilation": 3},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "1 x 1": {"kernel_size": 1},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "stride": 2, "groups": 4},
    "circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "stride": 2},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "groups": 2},
    "circular, same": {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
}


def _inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _run(layer: nn.Module, x: Tensor, **settings: Any) -> Watch:
    watch = Watch(nn.Sequential(layer.double()), **settings)
    layer(x).sin().mean().backward()
    return watch


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own
@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("case", GRID)
def test_every_kind_of_convolution(case: str, spatial: int) -> None:
    torch.manual_seed(0)
    layer = CONVS[spatial - 1](4, 8, **GRID[case])
    x = _inputs(3, 4, *(7, 6, 5)[:spatial])
    watch = _run(layer, x)
    a, g = watch.vectors()
    agree(g, watch.bias_gradients())
    agree(a, watch.mean_inputs(x))


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2]),
    samples=st.sampled_from([None, 1, 2, 9]),
)
def test_a_is_the_mean_of_the_unfolded_patches(
    kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int, samples: int | None
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups)
    x = _inputs(3, 2, 6, 5)
    watch = _run(layer, x, samples=samples)
    patches = F.unfold(x[:samples], kernel, dilation, padding, stride)
    agree(watch.vectors()[0], {"0": patches.mean((0, 2))})


@pytest.mark.parametrize("spatial", [2, 3])
def test_channels_last_changes_nothing(spatial: int) -> None:
    torch.manual_seed(0)
    memory_format: Any = (torch.channels_last, torch.channels_last_3d)[spatial - 2]
    layer = CONVS[spatial - 1](4, 6, 3, padding=1, groups=2)
    x = _inputs(3, 4, *(5, 4, 3)[:spatial])
    expected = _run(layer, x).mean_inputs(x)
    layer.zero_grad()
    layer = layer.to(memory_format=memory_format)
    watch = _run(layer, x.to(memory_format=memory_format))
    a, g = watch.vectors()
    agree(g, watch.bias_gradients())
    agree(a, expected)


def test_a_matrix_of_taps_too_large_to_keep_is_split_by_axis() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 5, padding=2)
    x = _inputs(2, 2, 230, 190)  # 25 taps on 43,700 positions: above the limit of one matrix
    watch = _run(layer, x)
    # Each entry is a mean of 43,700 values, of about 1/200 of their size: rounding is 1e-13 of it.
    agree(watch.vectors()[0], watch.mean_inputs(x), rtol=1e-11)


# ---- a subset of the samples -----------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 3), (4,)),
    "3-d linear": (nn.Linear(4, 3), (5, 4)),
    "conv": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 4)),
}


@pytest.mark.parametrize("g_scale", ["expectation", "reference"])
@pytest.mark.parametrize("samples", [1, 2, 6, 7, None])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_subset_stands_for_the_whole_batch(layer: str, samples: int | None, g_scale: str) -> None:
    module, shape = LAYERS[layer]
    module.double().zero_grad()
    x = _inputs(6, *shape)
    y = module(x)
    (dy,) = torch.autograd.grad(y.sin().mean(), y)
    expected = kronecker_vectors([Use("0", module, x, y, dy)], samples=samples, g_scale=g_scale)
    watch = _run(module, x, samples=samples, g_scale=g_scale)
    for actual, vector in zip(watch.vectors(), expected, strict=True):
        agree(actual, {"0": torch.from_numpy(vector).flatten()})
    watch.capture.remove()
