from collections import Counter

import pytest

from lightning_efficient.cli.bench.sweep import read_sweep
from lightning_efficient.cli.bench.techniques import TECHNIQUES, Rules, combination_name, parse_combination
from lightning_efficient.cli.errors import UserError
from lightning_efficient.cli.recipes import find_recipe

OURS = {"LFA", "ACP", "EVA"}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("none", "none"),
        ("F", "F"),
        ("R+F", "F+R"),
        ("Z3+L+R+F", "F+R+L+Z3"),
        ("EVA+ACP", "ACP+EVA"),
        ("LFA + R", "R+LFA"),
    ],
)
def test_a_combination_has_one_order(text: str, name: str) -> None:
    assert combination_name(parse_combination(text, Rules())) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f", r"there is no 'f'\. Did you mean 'F'\? Known are none, F, R, L, QL"),
        ("F+LFB", r"there is no 'LFB'\. Did you mean 'LFA'\?"),
        ("none+F", "'none' is the base"),
        ("F+F", "one is named twice"),
        ("L+LFA", r"L and LFA exclude each other, by the rule 'exclusive: \[L, QL, LFA, Q\]'"),
        ("Z2+ACP", r"Z2 and ACP exclude each other, by the rule 'exclusive: \[Z2, Z2O, Z3, Z3O, ACP\]'"),
        ("EVA+Z3", "EVA and Z3 exclude each other"),
        ("", "there is no ''"),
    ],
)
def test_a_wrong_combination_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_combination(text, Rules())


@pytest.mark.parametrize("letters", TECHNIQUES)
def test_each_technique_has_its_overlay(letters: str) -> None:
    path = find_recipe(TECHNIQUES[letters].overlay)
    assert path.read_text().startswith(f"# Overlay {letters}: ")


def test_the_paper_sweep_has_its_forty_combinations_and_our_rules_accept_them() -> None:
    """9 singles with none, 17 pairs, 10 triples, 4 quadruples; see arXiv 2311.03687 and its authors' toolkit."""
    named = [str(value) for value in read_sweep("bench/paper").matrix["technique"]]
    combinations = [parse_combination(name, Rules()) for name in named]
    assert len(set(combinations)) == len(named)
    theirs = [each for each in combinations if not OURS & set(each)]
    assert len(theirs) == 40
    assert Counter(max(1, len(each)) for each in theirs) == {1: 9, 2: 17, 3: 10, 4: 4}
    # A pair is there unless it is exclusive, mixes L with 4 bit, or QL with sharding, which the authors leave out.
    letters = ("F", "R", "L", "QL", "Z2", "Z2O", "Z3", "Z3O")
    pairs = {(a, b) for at, a in enumerate(letters) for b in letters[at + 1 :]}
    left_out = {("L", "QL")} | {(a, b) for a, b in pairs if a == "QL" or a.startswith("Z")}
    assert {each for each in theirs if len(each) == 2} == pairs - left_out
