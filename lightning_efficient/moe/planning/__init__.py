"""Which schedule for which layer on these machines: measured links, a model of the layer, trials, and a choice.

``shape`` has the sizes of a layer, ``steps`` what a rank does in it, and from both its traffic. ``links`` and
``device`` measure what a step costs (``sampler`` has the clock), ``timeline`` plays the steps, ``predict`` names the
candidates and chooses. ``trials`` runs those of them that ``search`` asks for. ``auto`` does all of it for a layer,
``plan`` keeps the outcome, ``report`` shows it.
"""

from lightning_efficient.moe.planning.auto import AutoSchedule
from lightning_efficient.moe.planning.device import DeviceCost, measure_device
from lightning_efficient.moe.planning.links import Links, measure_links
from lightning_efficient.moe.planning.plan import Choice, Plan
from lightning_efficient.moe.planning.predict import Prediction, candidates, choose, predict
from lightning_efficient.moe.planning.report import choice_table, explain, links_table
from lightning_efficient.moe.planning.sampler import Clock, GroupSampler
from lightning_efficient.moe.planning.shape import LayerShape, Rows, rows
from lightning_efficient.moe.planning.steps import traffic

__all__ = [
    "AutoSchedule",
    "Choice",
    "Clock",
    "DeviceCost",
    "GroupSampler",
    "LayerShape",
    "Links",
    "Plan",
    "Prediction",
    "Rows",
    "candidates",
    "choice_table",
    "choose",
    "explain",
    "links_table",
    "measure_device",
    "measure_links",
    "predict",
    "rows",
    "traffic",
]
