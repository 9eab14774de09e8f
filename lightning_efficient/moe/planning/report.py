"""A plan for people to read: tables of links and candidates, and one sentence of why."""

from __future__ import annotations

from rich.table import Table

from lightning_efficient.moe.planning.links import Links
from lightning_efficient.moe.planning.plan import Choice

_GROUPS = {"block": "EP x ESP", "ep": "EP", "esp": "ESP", "mp": "MP", "device": "device"}


def links_table(links: Links) -> Table:
    """Return what each collective costs: latency, and bytes of the whole message per second.

    Args:
        links: as measured.
    """
    table = Table("collective", "group", "latency\nµs", "bandwidth\nMB/s", "misfit", title="links, slowest rank")
    for column in table.columns[2:]:
        column.justify = "right"
    for (op, axis), line in links.fits.items():
        bandwidth = f"{1e-6 / line.beta_s_per_byte:.1f}" if line.beta_s_per_byte else "-"
        misfit = f"{line.residual:.0%}" + (" refused" if (op, axis) in links.refused else "")
        table.add_row(op.replace("_", "-"), _GROUPS[axis], f"{1e6 * line.alpha_s:.0f}", bandwidth, misfit)
    return table


def choice_table(choice: Choice) -> Table:
    """Return the candidates, fastest first, the chosen one marked.

    Args:
        choice: of a layer.
    """
    shape = choice.shape
    factor = "dropless" if shape.capacity_factor is None else f"capacity {shape.capacity_factor:g}"
    title = f"{shape.tokens} tokens of {shape.dim}, {shape.num_experts} experts of {shape.hidden}, top {shape.top_k}, "
    columns = ("", "schedule", "predicted\nms", "measured\nms", "waiting\nms", "most of it")
    table = Table(*columns, title=f"{title}{factor}, {shape.dtype}: forward and backward")
    for column in table.columns[2:5]:
        column.justify = "right"

    def rank(label: str, seconds: float) -> tuple[bool, float]:
        return label not in choice.measured, choice.measured.get(label, seconds)

    for each in sorted(choice.predictions, key=lambda own: rank(own.schedule.label, own.seconds)):
        label = each.schedule.label
        chosen = each.schedule == choice.schedule
        measured = f"{1e3 * choice.measured[label]:.1f}" if label in choice.measured else ""
        waiting = f"{1e3 * each.exposed_s:.1f}"
        dominant = _named(each.dominant)
        style = "bold green" if chosen else None
        mark = ">" if chosen else ""
        table.add_row(mark, label, f"{1e3 * each.seconds:.1f}", measured, waiting, dominant, style=style)
    return table


def explain(choice: Choice) -> str:
    """Return one sentence: what was chosen, and why.

    Args:
        choice: of a layer.
    """
    label = choice.schedule.label
    text = f"{label} for {choice.shape.tokens} tokens: {choice.reason}"
    own = next((each for each in choice.predictions if each.schedule == choice.schedule), None)
    if own is None:
        return f"{text}."
    text += f", {1e3 * choice.measured.get(label, own.seconds):.1f} ms forward and backward"
    text += f", most of it {_named(own.dominant)}"
    others = {name: seconds for name, seconds in choice.measured.items() if name != label}
    if not choice.measured:
        others = {each.schedule.label: each.seconds for each in choice.predictions if each.schedule != choice.schedule}
    if others:
        runner_up = min(others, key=lambda name: others[name])
        text += f"; next {runner_up} with {1e3 * others[runner_up]:.1f} ms"
    return f"{text}."


def _named(part: str) -> str:
    names = {"gate": "the gate", "move": "moving rows", "experts": "the experts", "nothing": "nothing"}
    if part in names:
        return names[part]
    op, _, axis = part.partition(" ")
    return f"{op.replace('_', '-')} over {_GROUPS[axis]}"
