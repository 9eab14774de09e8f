r"""RMSNorm with frozen gains as a function that keeps x in its own dtype and one number per row.

.. math::

   y = g \odot \hat x, \quad \hat x = r x, \quad r = (\mathrm{mean}(x^2) + \epsilon)^{-1/2}, \qquad
   dx = r\,(g \odot dy - \hat x\,\mathrm{mean}(g \odot dy \odot \hat x))

Dimension letters: T tokens, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from lightning_efficient.lora_fa.projection import row_blocks


def rms_norm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """Return the normalised ``x``, (..., D), computed in float32 or better; ``gain_D`` gets no gradient."""
    y: Tensor = _RMSNorm.apply(x, gain_D, eps)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        # The same operations in the same order as the modules that this stands in for: equal to the last bit.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        y: Tensor = gain_D * (wide * scale).to(x.dtype)
        ctx.save_for_backward(x, scale, gain_D)
        return y

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, scale, gain_D = ctx.saved_tensors
        x_TD, dy_TD, scale_T1 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), scale.view(-1, 1)
        dx_TD = torch.empty_like(x_TD)
        gain_D = gain_D.to(scale.dtype)
        for start, stop in row_blocks(x_TD):
            part = slice(start, stop)
            normed = x_TD[part].to(scale.dtype) * scale_T1[part]
            d = dy_TD[part] * gain_D
            along = (d * normed).mean(-1, keepdim=True)
            dx_TD[part] = d.sub_(normed.mul_(along)).mul_(scale_T1[part])
        return dx_TD.view(x.shape), None, None
