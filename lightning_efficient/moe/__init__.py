"""Mixture-of-experts layers, spread over ranks by MP, EP and ESP, and the schedules of Parm.

Plain torch: a loop of your own makes a :class:`MoETopology`, calls :func:`parallelize`, and after each backward
:meth:`GradientSync.finish`. :class:`~lightning_efficient.strategies.ParmStrategy` does so for a Trainer.
"""

from lightning_efficient.moe.balance import SelectionBias
from lightning_efficient.moe.experts import Experts
from lightning_efficient.moe.grad_norm import clip_grad_norm, clip_grad_value, grad_norm
from lightning_efficient.moe.grad_sync import GradientSync
from lightning_efficient.moe.layer import FixedSchedule, MoELayer, aux_loss, balance_loads, moe_layers
from lightning_efficient.moe.meter import Meter, MoEStats
from lightning_efficient.moe.parallelize import parallelize
from lightning_efficient.moe.parameter_groups import parameter_groups
from lightning_efficient.moe.router import Capacity, Router, Routing
from lightning_efficient.moe.schedule import SCHEDULES, Schedule, schedule_named
from lightning_efficient.moe.topology import MoESizes, MoETopology
from lightning_efficient.moe.traffic import Traffic, count_traffic

__all__ = [
    "SCHEDULES",
    "Capacity",
    "Experts",
    "FixedSchedule",
    "GradientSync",
    "Meter",
    "MoELayer",
    "MoESizes",
    "MoEStats",
    "MoETopology",
    "Router",
    "Routing",
    "Schedule",
    "SelectionBias",
    "Traffic",
    "aux_loss",
    "balance_loads",
    "clip_grad_norm",
    "clip_grad_value",
    "count_traffic",
    "grad_norm",
    "moe_layers",
    "parallelize",
    "parameter_groups",
    "schedule_named",
]
