"""Every schedule, on every split of 2, 4 and 8 ranks, equals the mixture of experts by its definition."""

from itertools import product

import pytest

from lightning_efficient.moe import SCHEDULES, FixedSchedule, MoESizes, schedule_named
from tests.moe._grid import DROPS, Case, Compared, Setting, compare, distance, expected, labels, splits
from tests.moe.reference import reference
from tests.support.ranks import run_ranks

SETTINGS = [
    Setting(
        k,
        drops,
        activation,
        bias=bool((k + row + column) % 2),
        S=(8, 6, 5, 6)[row],  # 5 and 6 leave some ranks of an MP group fewer tokens, or none
        normalize="after_drop" if row == 1 else "never" if row == 2 and k == 3 else "before_drop",
    )
    for k, (row, drops), (column, activation) in product((1, 2, 3), enumerate(DROPS), enumerate(("gelu", "swiglu")))
]

EXACT = 1e-9
"""float64, sums of up to a few hundred products of size 1 to 10: rounding stays below 1e-13."""


def schedules(turn: int) -> list[str]:
    """Each schedule once; in 1, 2, 3 and 4 chunks in turn."""
    return [
        each.with_chunks(1 + (turn + number) % 4 if each.can_be_chunked else 1).label
        for number, each in enumerate(SCHEDULES.values())
    ]


def whole_grid(world: int, model_parallel: int | None = None) -> list[tuple[MoESizes, Setting, list[str]]]:
    """All settings on all splits by all schedules; 8 ranks take one of the two ways to drop, or not to, in turn."""
    return [
        (sizes, setting, schedules(turn + number))
        for turn, sizes in enumerate(splits(world, model_parallel))
        for number, setting in enumerate(SETTINGS)
        if world < 8 or (DROPS.index(setting.drops) + number // 8 + turn) % 2 == 0
    ]


def sample(world: int) -> list[tuple[MoESizes, Setting, list[str]]]:
    """All splits, with some of the settings, by all schedules."""
    each = 4 if world == 2 else 1
    return [
        (sizes, SETTINGS[(turn * each + number) * 5 % len(SETTINGS)], schedules(turn + number))
        for turn, sizes in enumerate(splits(world))
        for number in range(each)
    ]


def count(cases: list[tuple[MoESizes, Setting, list[str]]]) -> int:
    return len(set[Case]((sizes, setting, label) for sizes, setting, labels in cases for label in labels))


def run(
    world: int, cases: list[tuple[MoESizes, Setting, list[str]]], precision: str = "float64", *, timeout: float = 170
) -> list[Compared]:
    """Run the cases and return what each rank found for each, after checking that none is missing."""
    known = expected(
        list(dict.fromkeys(setting for _, setting, _ in cases)),
        world,
        sorted({sizes.model_parallel for sizes, *_ in cases}),
    )
    found = run_ranks(compare, world, cases, known, precision, timeout=timeout)
    wanted = [(sizes, setting, label) for sizes, setting, labels in cases for label in labels]
    assert all([each.case for each in of_rank] == wanted for of_rank in found)
    return [each for of_rank in found for each in of_rank]


def assert_all_equal(found: list[Compared]) -> None:
    wrong = [(each.case, each.apart) for each in found if not each.worst < EXACT]
    assert not wrong, f"{len(wrong)} of {len(found)}, as {wrong[:3]}"
    for drops in ("position", "probs"):
        assert any(each.dropped for each in found if each.case[1].drops == drops)
    assert not any(each.dropped for each in found if each.case[1].drops in ("even", "dropless"))


def test_the_grid_has_every_split_and_each_value_of_every_axis() -> None:
    assert [len(splits(world)) for world in (2, 4, 8)] == [6, 18, 40]
    in_all = sum(count(whole_grid(world)) for world in (2, 4, 8))
    assert in_all == (6 * 24 + 18 * 24 + 40 * 12) * len(SCHEDULES) > 1000
    for world in (2, 4, 8):
        for sizes in splits(world):
            mine = [case for case in whole_grid(world, sizes.model_parallel) if case[0] == sizes]
            axes = {(each.k, each.drops in ("position", "probs"), each.activation) for _, each, _ in mine}
            assert len(axes) == 12
            assert {schedule_named(label).name for *_, labels in mine for label in labels} == set(SCHEDULES)
    sampled = [case for world in (2, 4) for case in sample(world)]
    assert {sizes for sizes, *_ in sampled} == {*splits(2), *splits(4)}
    assert {setting for _, setting, _ in sampled} == set(SETTINGS)
    assert {label for *_, schedules in sampled for label in schedules} == set(labels())


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_a_sample_of_the_grid_equals_the_definition(world: int) -> None:
    cases = sample(world)
    found = run(world, cases)
    assert len(found) == world * count(cases) >= world * 198
    assert_all_equal(found)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("world", "model_parallel"), [(world, mp) for world in (2, 4, 8) for mp in (1, 2, 4, 8) if mp <= world]
)
def test_the_whole_grid_equals_the_definition(world: int, model_parallel: int) -> None:
    cases = whole_grid(world, model_parallel)
    found = run(world, cases, timeout=1700)
    assert len(found) == world * count(cases)
    print(f"{world} ranks, MP {model_parallel}: {count(cases)} cases, worst {max(each.worst for each in found):.1e}")
    assert_all_equal(found)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_one_process_equals_the_definition_by_every_schedule(setting: Setting) -> None:
    layer, (x, grad) = setting.layer(), setting.data(1)
    result = reference(setting.layer(), x, grad)
    weights = {name.removeprefix("experts."): each for name, each in layer.named_parameters()}
    for label in labels((1, 3)):
        layer.zero_grad()
        layer.scheduler = FixedSchedule(schedule_named(label))
        x_SM = x[0].clone().requires_grad_()
        y_SM = layer(x_SM)
        assert layer.aux_loss is not None
        ((y_SM * grad[0]).sum() + layer.aux_loss).backward()
        apart = [
            distance(y_SM, result.y[0]),
            distance(x_SM.grad, result.dx[0]),
            distance(layer.aux_loss, result.aux[0]),
        ]
        apart.append(distance(weights["router.weight"].grad, result.d_router))
        apart += [
            distance(weights[name.removeprefix("experts.")].grad, each) for name, each in result.d_experts.items()
        ]
        assert max(apart) < EXACT, label


NARROW = [
    Setting(2, "position", "swiglu", S=8),
    Setting(1, "even", "gelu", bias=True),
    Setting(3, "dropless", "swiglu", bias=True),
]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        # Of the largest element. Sums of up to 100 products, each rounded to 6e-8.
        ("float32", 1e-5),
        # Rows are rounded to 4e-3 on the way in and out of each product, about four times; a factor of 2 would be 0.5.
        ("bfloat16", 4e-2),
    ],
)
def test_narrower_numbers_equal_the_definition_to_their_rounding(precision: str, tolerance: float) -> None:
    sizes = [MoESizes(2, 2, 2), MoESizes(4, 1, 2)]
    cases = [(each, setting, schedules(number)) for each in sizes for number, setting in enumerate(NARROW)]
    found = run(4, cases, precision)
    assert len(found) == 4 * 2 * 3 * len(SCHEDULES)
    wrong = [(each.case, each.relative) for each in found if not max(each.relative.values()) < tolerance]
    assert not wrong, f"{len(wrong)} of {len(found)}, as {wrong[:3]}"
