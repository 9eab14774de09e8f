r"""One linear with a frozen base and a LoRA-FA adapter, as a function that keeps only h of rank R for backward.

.. math::

   h = D(x) A^\top, \qquad y = x W^\top + b + s\,h B^\top

   dB = s\,dy^\top h, \qquad dx = dy\,W + M \odot (s\,dy\,B A) / (1 - p)

Neither gradient needs x: W, A and B are there anyway, h is (T, R), and the dropout mask M follows from a seed. The base
runs inside the function, where nothing is recorded, so what it would keep (a cast or dequantised copy of W, x itself)
is not kept either. Source: LoRA-FA (arXiv 2308.03303), section 3.

Dimension letters: T tokens, K inputs, N outputs, R rank.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from lightning_efficient.lora_fa.dropout import draw_seed, keep_mask
from lightning_efficient.lora_fa.frozen import Dense, FrozenLinear
from lightning_efficient.lora_fa.projection import add_expanded, add_product, project, up_gradients

DropoutMode = Literal["recompute", "lowrank", "saved"]


class Tensors(NamedTuple):
    """The tensors of an adapted linear, in the order in which the functions here take them.

    Attributes:
        A_RK: the frozen down-projection.
        B_NR: the up-projection.
        weight_NK: of an ordinary base, None for others.
        bias_N: of an ordinary base.
        seed_2: of the dropout.
        noise_TK: dropout's factors, for ``dropout_mode="saved"``.
    """

    A_RK: Tensor
    B_NR: Tensor
    weight_NK: Tensor | None = None
    bias_N: Tensor | None = None
    seed_2: Tensor | None = None
    noise_TK: Tensor | None = None


class Setting(NamedTuple):
    """What else an adapted linear is made of.

    Attributes:
        scale: s.
        p: probability of a drop; 0 outside of training.
        mode: where and how dropout is done.
        base: a base whose weight is no ordinary tensor.
    """

    scale: float
    p: float = 0.0
    mode: DropoutMode = "recompute"
    base: FrozenLinear | None = None


def lora_fa_linear(
    x: Tensor,
    base_fwd: Callable[[Tensor], Tensor],
    weight_fn: Callable[[], Tensor],
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float = 0.0,
    mode: DropoutMode = "recompute",
) -> Tensor:
    r"""Return :math:`x W^\top + b + s\,D(x) A^\top B^\top`, keeping nothing of x for backward.

    Args:
        x: the input, (..., K).
        base_fwd: the frozen base, ``x -> x W^T + b``; runs without recording a graph. Its result is written to, so it
            has to be a new tensor.
        weight_fn: returns W, (N, K), when backward needs it: a parameter, or a copy dequantised then.
        A: (R, K), gets no gradient.
        B: (N, R).
        scale: s, usually alpha / R.
        p: probability that dropout zeroes an entry.
        mode: ``"recompute"``: dropout on x, its mask remade from a seed; ``"lowrank"``: on h, also from a seed;
            ``"saved"``: on x, with torch's own mask, which is kept.

    Returns:
        (..., N), in the dtype of ``base_fwd``'s result.

    Raises:
        ValueError: the shapes do not fit, p is outside [0, 1), or there is no such mode.

    Example:
        >>> layer = torch.nn.Linear(8, 4).requires_grad_(False)
        >>> A, B = torch.randn(2, 8), torch.zeros(4, 2, requires_grad=True)
        >>> y = lora_fa_linear(torch.randn(3, 8), layer, lambda: layer.weight, A, B, scale=2.0)
    """
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or x.shape[-1] != A.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)}, A {tuple(A.shape)} and B {tuple(B.shape)} do not fit: they have to be (..., K), "
            "(R, K) and (N, R). Check which of A and B is transposed."
        )
    if not 0 <= p < 1:
        raise ValueError(f"p is {p}: dropout needs a probability in [0, 1). Set 0 for none.")
    if mode not in ("recompute", "lowrank", "saved"):
        raise ValueError(f"mode is {mode!r}: there are 'recompute', 'lowrank' and 'saved'. Use one of them.")
    return adapted_linear(x, A, B, Setting(scale, p, mode, _Callables(base_fwd, weight_fn)))


class _Callables(NamedTuple):
    base_fwd: Callable[[Tensor], Tensor]
    weight_fn: Callable[[], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.base_fwd(x)

    def weight(self, dtype: torch.dtype) -> Tensor:
        return self.weight_fn().to(dtype)


def adapted_linear(x: Tensor, A_RK: Tensor, B_NR: Tensor, setting: Setting, base: Dense | None = None) -> Tensor:
    """:func:`lora_fa_linear` of a base that is either ``base`` or ``setting.base``, unchecked."""
    weight, bias = base if base is not None else (None, None)
    tensors = Tensors(A_RK, B_NR, weight, bias, *draw_dropout(x, A_RK, setting))
    y: Tensor = _LoRAFA.apply(x, setting, *tensors)  # type: ignore[no-untyped-call]
    return y


def draw_dropout(x: Tensor, A_RK: Tensor, setting: Setting) -> tuple[Tensor | None, Tensor | None]:
    """Return the seed and the noise that this call's dropout needs."""
    if setting.p == 0:
        return None, None
    if setting.mode == "saved":
        return None, _torch_noise(x.reshape(-1, x.shape[-1]), setting.p, _adapter_dtype(x, A_RK))
    return draw_seed(), None


def _torch_noise(x_TK: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Dropout's factors 0 and 1 / (1 - p), drawn as torch's own dropout draws them."""
    return F.dropout(torch.ones_like(x_TK, dtype=dtype, requires_grad=False), p)


class _LoRAFA(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, setting: Setting, *flat: Tensor | None) -> Tensor:
        tensors = Tensors(*flat)  # type: ignore[arg-type]
        y, h_TR = forward_linear(x, tensors, setting)
        ctx.save_for_backward(h_TR, *flat)
        ctx.setting, ctx.x_dtype, ctx.x_shape = setting, x.dtype, x.shape
        return y

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, dy: Tensor) -> Any:
        h_TR, *flat = ctx.saved_tensors
        tensors = Tensors(*flat)
        wants_x, wants_B = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        dy_TN = dy.reshape(-1, dy.shape[-1])
        with autocast_off(dy.device.type):
            u_TR, dB_NR = up_gradients(
                dy_TN, h_TR, tensors.B_NR.to(h_TR.dtype), ctx.setting.scale, u=wants_x, dB=wants_B
            )
            dx = None
            if u_TR is not None:
                weight_NK = weight_of(tensors, ctx.setting, dy.dtype)
                dx = input_gradient(dy_TN, u_TR, weight_NK, tensors, ctx.setting).to(ctx.x_dtype).view(ctx.x_shape)
        dB = None if dB_NR is None else dB_NR.to(tensors.B_NR.dtype).mul_(ctx.setting.scale)
        return dx, None, None, dB, None, None, None, None


def forward_linear(x: Tensor, tensors: Tensors, setting: Setting) -> tuple[Tensor, Tensor]:
    """Return y (..., N) and h (T, R). Nothing else of the call needs to be kept."""
    cast = autocast_dtype(x)
    if tensors.weight_NK is None:
        assert setting.base is not None
        y = setting.base.forward(x)
    with autocast_off(x.device.type):
        x = x if cast is None else x.to(cast)
        if tensors.weight_NK is not None:
            weight_NK, bias_N = _cast(tensors.weight_NK, cast), _cast(tensors.bias_N, cast)
            y = F.linear(x, weight_NK, bias_N)  # type: ignore[arg-type]
        y = y.contiguous()  # a base of the caller's may return another memory order
        dtype = _adapter_dtype(x, tensors.A_RK) if cast is None else cast
        h_TR = down(x.reshape(-1, x.shape[-1]), tensors, setting, dtype)
        add_product(y.view(-1, y.shape[-1]), h_TR, tensors.B_NR.to(dtype), setting.scale)
    return y, h_TR


def down(x_TK: Tensor, tensors: Tensors, setting: Setting, dtype: torch.dtype) -> Tensor:
    """Return ``h = D(x) A^T``, (T, R), or ``D(x A^T)`` where dropout is on h."""
    A_RK = tensors.A_RK.to(dtype)
    if tensors.noise_TK is not None:
        return (x_TK.to(dtype) * tensors.noise_TK) @ A_RK.t()
    if tensors.seed_2 is None or setting.mode == "recompute":
        return project(x_TK, A_RK, tensors.seed_2, setting.p)
    return _drop_lowrank(project(x_TK, A_RK, None, 0.0), tensors.seed_2, setting.p)


def input_gradient(
    dy_TN: Tensor, u_TR: Tensor, weight_NK: Tensor, tensors: Tensors, setting: Setting, first_row: int = 0
) -> Tensor:
    """Return ``dx = dy W + M * (u A) / (1 - p)``, (T, K), in dy's dtype.

    Args:
        dy_TN: gradient of the output.
        u_TR: ``s dy B``.
        weight_NK: W in dy's dtype.
        tensors: of the linear.
        setting: of the linear.
        first_row: the row of the whole batch that ``dy_TN`` starts at.
    """
    dx_TK = dy_TN @ weight_NK
    A_RK = tensors.A_RK.to(u_TR.dtype)
    if tensors.noise_TK is not None:
        rows = tensors.noise_TK[first_row : first_row + len(u_TR)]
        dx_TK.add_((u_TR @ A_RK).mul_(rows))
    elif tensors.seed_2 is None or setting.mode == "recompute":
        add_expanded(dx_TK, u_TR, A_RK, tensors.seed_2, setting.p, first_row)
    else:
        add_expanded(dx_TK, _drop_lowrank(u_TR, tensors.seed_2, setting.p, first_row), A_RK, None, 0.0)
    return dx_TK


def weight_of(tensors: Tensors, setting: Setting, dtype: torch.dtype) -> Tensor:
    """Return W, (N, K), cast or dequantised for this one use."""
    if tensors.weight_NK is not None:
        return tensors.weight_NK.to(dtype)
    assert setting.base is not None
    return setting.base.weight(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast would compute a linear of ``x`` in; None where it would leave x alone."""
    if x.dtype == torch.float64 or not _autocasts(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def autocast_off(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast, for code that casts by itself."""
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


def _autocasts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def _adapter_dtype(x: Tensor, A_RK: Tensor) -> torch.dtype:
    """What the adapter computes in: autocast's dtype, else that of its own parameters."""
    return autocast_dtype(x) or A_RK.dtype


def _drop_lowrank(h_TR: Tensor, seed_2: Tensor, p: float, first_row: int = 0) -> Tensor:
    rows = (first_row, first_row + len(h_TR))
    return h_TR.mul_(keep_mask(seed_2, rows, h_TR.shape[1], p, h_TR.device)).mul_(1 / (1 - p))


def _cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return tensor if tensor is None or dtype is None else tensor.to(dtype)
