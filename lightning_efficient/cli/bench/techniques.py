"""The techniques of a sweep, their letters, and which of them cannot meet.

Letters and combinations are those of "Dissecting the Runtime Performance of the Training, Fine-tuning, and Inference of
Large Language Models" (arXiv 2311.03687); LFA, ACP and EVA are this package's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_efficient.cli.errors import UserError, did_you_mean

NONE = "none"
CONTROL = "run"
"""Axis of a case that is measured again, to see how much the machine has changed meanwhile."""


@dataclass(frozen=True, slots=True)
class Technique:
    """One technique.

    Attributes:
        letters: its name in a sweep.
        what: one line for tables.
        needs_cuda: whether it runs on GPUs only.
        needs_world_2: whether it needs two processes or more.
        extras: package to import, and the extra that installs it.
    """

    letters: str
    what: str
    needs_cuda: bool = False
    needs_world_2: bool = False
    extras: tuple[tuple[str, str], ...] = ()

    @property
    def overlay(self) -> str:
        """Name of the recipe that switches it on."""
        return f"bench/techniques/{self.letters}"


_PEFT = ("peft", "peft")
_BITSANDBYTES = ("bitsandbytes", "quantized")

# In this order they stand in the name of a combination, and their overlays follow each other.
TECHNIQUES: Mapping[str, Technique] = {
    each.letters: each
    for each in (
        Technique("F", "fused attention: flash attention where there is one"),
        Technique("R", "recomputation of each decoder layer's activations"),
        Technique("L", "LoRA of rank 64 (peft)", extras=(_PEFT,)),
        Technique("QL", "QLoRA: 4-bit base, LoRA of rank 64", needs_cuda=True, extras=(_PEFT, _BITSANDBYTES)),
        Technique("Q", "4-bit base", needs_cuda=True, extras=(_BITSANDBYTES,)),
        Technique("LFA", "LoRA-FA of rank 64"),
        Technique("Z2", "gradients and optimizer state sharded (FSDP2)", needs_world_2=True),
        Technique("Z2O", "Z2, with the states on the host", needs_cuda=True, needs_world_2=True),
        Technique("Z3", "parameters sharded too (FSDP2)", needs_world_2=True),
        Technique("Z3O", "Z3, with the states on the host", needs_cuda=True, needs_world_2=True),
        Technique("ACP", "gradients sent as low-rank factors (ACP-SGD)", needs_world_2=True),
        Technique("EVA", "second-order optimizer Eva (EvaP)"),
    )
}


_SHARDED = ("Z2", "Z2O", "Z3", "Z3O")
_ADAPTERS = ("L", "QL", "LFA")


def why_not_together(techniques: Sequence[str]) -> str:
    """Return why a combination that makes sense does not run yet; empty where it does.

    Args:
        techniques: letters.
    """
    adapter = next((name for name in techniques if name in _ADAPTERS), None)
    sharded = next((name for name in techniques if name in _SHARDED), None)
    if adapter and sharded:
        return f"{adapter} with {sharded} is not supported: adapters come after the sharding, which cannot take them."
    return ""


@dataclass(frozen=True, slots=True)
class Rules:
    """What cannot run, and where.

    Attributes:
        exclusive: groups of which a combination holds one technique at most.
        needs_cuda: techniques that run on GPUs only; ``none`` may be among them.
        needs_world_2: techniques that need two processes or more.
    """

    exclusive: tuple[tuple[str, ...], ...] = (
        ("Z2", "Z2O", "Z3", "Z3O", "ACP"),  # one strategy
        ("L", "QL", "LFA", "Q"),  # one form of the linears
        ("EVA", "Z2", "Z2O", "Z3", "Z3O"),  # Eva reads whole weights
    )
    needs_cuda: tuple[str, ...] = tuple(each.letters for each in TECHNIQUES.values() if each.needs_cuda)
    needs_world_2: tuple[str, ...] = tuple(each.letters for each in TECHNIQUES.values() if each.needs_world_2)


def parse_combination(text: str, rules: Rules) -> tuple[str, ...]:
    """Return the techniques of a combination such as ``R+F`` in their canonical order; ``none`` is empty.

    Args:
        text: letters joined by ``+``.
        rules: which exclude each other.

    Raises:
        UserError: unknown letters, one named twice, ``none`` beside others, or two that exclude each other.
    """
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in TECHNIQUES and name != NONE:
            raise UserError(
                f"technique '{text}': there is no '{name}'.{did_you_mean(name, [NONE, *TECHNIQUES])} Known are "
                f"{', '.join([NONE, *TECHNIQUES])}, and combinations such as F+R."
            )
    if NONE in names and len(names) > 1:
        raise UserError(f"technique '{text}': 'none' is the base without any technique. Leave it out of combinations.")
    if len(set(names)) < len(names):
        raise UserError(f"technique '{text}': one is named twice. Name each once.")
    for group in rules.exclusive:
        met = [name for name in names if name in group]
        if len(met) > 1:
            raise UserError(
                f"technique '{text}': {' and '.join(met)} exclude each other, by the rule 'exclusive: "
                f"[{', '.join(group)}]'. Keep one of them."
            )
    return tuple(name for name in TECHNIQUES if name in names)


def combination_name(techniques: Sequence[str]) -> str:
    """Return the name of a combination, such as ``F+R``; ``none`` for an empty one."""
    return "+".join(techniques) or NONE
