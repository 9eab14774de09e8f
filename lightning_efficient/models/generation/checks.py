"""What every decoder refuses."""

from __future__ import annotations

from collections.abc import Container, Sequence


def check_max_len(slots: int, max_len: int | None, longest: int | None) -> int:
    """Return the number of tokens that a slot has room for.

    Args:
        slots: of the decoder.
        max_len: what the user asked for.
        longest: what the model can take, if it says.

    Raises:
        ValueError: a number is below 1, ``max_len`` is above ``longest``, or neither is known.
    """
    if slots < 1:
        raise ValueError(f"A decoder of {slots} slots serves nothing. Give 1 or more.")
    if max_len is None:
        if longest is None:
            raise ValueError(
                "The model's configuration does not say how many tokens it takes. Give the decoder a max_len."
            )
        return longest
    if max_len < 1 or (longest is not None and max_len > longest):
        raise ValueError(f"max_len is {max_len}: the model takes 1 to {longest} tokens. Give a number in that range.")
    return max_len


def check_prompts(
    slots: Sequence[int], prompts: Sequence[Sequence[int]], *, in_use: Container[int], n_slots: int, max_len: int
) -> None:
    """Refuse prompts without a free slot, and those that do not fit.

    Raises:
        ValueError: a slot is in use or does not exist, or a prompt is empty or too long.
    """
    if len(slots) != len(prompts) or len(set(slots)) != len(slots) or not slots:
        raise ValueError(f"{len(prompts)} prompts for the slots {list(slots)}: give each prompt a slot of its own.")
    for slot, prompt in zip(slots, prompts, strict=True):
        if not 0 <= slot < n_slots or slot in in_use:
            state = "in use" if slot in in_use else f"not one of the {n_slots}"
            raise ValueError(f"Slot {slot} is {state}: a prompt needs a free one. Release one, or take another.")
        if not 1 <= len(prompt) <= max_len:
            raise ValueError(f"A prompt has {len(prompt)} tokens: 1 to {max_len} fit into a slot. Change the prompt.")
