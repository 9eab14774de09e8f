"""Loss scaling of mixed precision, as the compressors see it."""

from torch import Tensor


class Scale:
    """The factor S of mixed-precision loss scaling; errors are kept unscaled, so ``A = M + S E``.

    On the CPU it is a number; on other devices it stays a tensor, so that nothing waits for the device.
    """

    def __init__(self, scale: Tensor | float | None) -> None:
        self.active = scale is not None
        self._scale: float | Tensor | None = scale
        if isinstance(scale, Tensor) and scale.device.type == "cpu":
            self._scale = float(scale)

    def add_error(self, a_NM: Tensor, error_NM: Tensor) -> None:
        """``A += S E``."""
        if self._scale is None:
            a_NM.add_(error_NM)
        elif isinstance(self._scale, float):
            a_NM.add_(error_NM, alpha=self._scale)
        else:
            a_NM.add_(error_NM * self._scale)

    def unscale_(self, x: Tensor) -> Tensor:
        """``x /= S``, in place."""
        return x if self._scale is None else x.div_(self._scale)

    def rescale_(self, x: Tensor) -> Tensor:
        """``x *= S``, in place: for gradients made from scratch, which the scaler will divide by S."""
        return x if self._scale is None else x.mul_(self._scale)
