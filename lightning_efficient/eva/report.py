"""What the preconditioner does to each layer, for people."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_efficient.eva.config import EvaConfig
from lightning_efficient.eva.layout import Layout

if TYPE_CHECKING:
    from lightning_efficient.eva.sources import GradientVectors, LayerVectors, States


@dataclass(frozen=True)
class LayerReport:
    r"""What is known of one layer's Kronecker vectors.

    Attributes:
        rho: share of the captured direction that is taken out of the gradient, in [0, 1]:
            :math:`\rho = c/(\gamma + c)` with :math:`c = |a|^2|g|^2` (Eva-f: :math:`|a|^2`). Near 0 the preconditioner
            does nothing. None where there are no vectors. For EvaP: share of the first leading direction.
        a_norm: :math:`|a|`, the bias's 1 included; None where there are no vectors.
        g_norm: :math:`|g|`; None for Eva-f too.
        skipped: why the parameter has no vectors and follows the fallback rule; empty where it has.
    """

    rho: float | None = None
    a_norm: float | None = None
    g_norm: float | None = None
    skipped: str = ""


def layer_reports(
    source: "LayerVectors | GradientVectors",
    states: "States",
    group_of: dict[int, int],
    damping: Sequence[float],
    config: EvaConfig,
) -> dict[str, LayerReport]:
    """Report on the layers that have vectors by now; of a layer with groups, the largest rho.

    Args:
        source: of the vectors.
        states: the optimizer's, of each layer's weight.
        group_of: parameter group of each parameter, by id.
        damping: of each parameter group.
        config: of the optimizer.
    """
    # NaN marks a layer that was never captured: frozen, or without use.
    active = ["kv_a" in state and not bool(state["kv_a"].isnan().any()) for state in states]
    layers = [layer for layer, keep in zip(source.layers, active, strict=True) if keep]
    if not layers:
        return {}
    layout = Layout.of(layers, source.device)
    a_A, g_R = source.vectors(states, active)
    has_bias_L = torch.tensor([float(layer.bias is not None) for layer in layers], device=source.device)
    alpha_S = layout.sum_inputs(a_A.square()) + has_bias_L[layout.layer_of_segment_S]
    beta_S = torch.ones_like(alpha_S) if g_R is None else layout.sum_outputs(g_R.square())
    gamma_S = torch.tensor([damping[group_of[id(layer.weight)]] for layer in layers], device=source.device)
    gamma_S = gamma_S[layout.layer_of_segment_S]
    curv_S = alpha_S * beta_S
    relative = config.damping_mode == "relative"
    rho_S = torch.where(curv_S > 0, curv_S / (curv_S * (1 + gamma_S) if relative else curv_S + gamma_S), 0)
    columns = layout.layer_of_segment_S.tolist(), rho_S.tolist(), alpha_S.sqrt().tolist(), beta_S.sqrt().tolist()
    reports: dict[str, LayerReport] = {}
    for index, rho, a_norm, g_norm in zip(*columns, strict=True):
        name = layers[index].name
        if name not in reports or rho > (reports[name].rho or 0.0):
            reports[name] = LayerReport(rho, a_norm, None if g_R is None else g_norm)
    return reports
