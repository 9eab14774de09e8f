"""A plan as plain values: in a checkpoint, and in a file that holds only where nothing has changed."""

import io
import json

import pytest
import torch

from lightning_efficient._links import AlphaBeta
from lightning_efficient.moe import schedule_named
from lightning_efficient.moe.planning import Choice, DeviceCost, LayerShape, Links, Plan, Prediction, explain
from lightning_efficient.moe.planning.plan import setting_of
from lightning_efficient.moe.topology import MoESizes, MoETopology

SHAPE = LayerShape(tokens=64, dim=16, hidden=32, num_experts=8, top_k=2, dtype="bfloat16", token_dtype="float32")
SETTING = {
    "hosts": ["a: cpu", "b: cpu"],
    "world_size": 2,
    "sizes": {"model_parallel": 2, "expert_parallel": 2, "expert_sharding": 1},
    "backend": "gloo",
    "torch": "2.13.0",
}


def plan():
    predictions = (
        Prediction(schedule_named("s1_hier/4"), 0.1, 0.2, {"all_to_all ep": 0.25, "experts": 0.1}, 0.15),
        Prediction(schedule_named("s2"), 0.2, 0.3, {"all_to_all block": 0.4}, 0.3),
    )
    choice = Choice(
        SHAPE,
        schedule_named("s1_hier/4"),
        "the fastest of those tried",
        predictions,
        {"s1_hier/4": 0.31},
        doubtful=True,
    )
    links = Links({("all_to_all", "ep"): AlphaBeta(1e-3, 1e-8, 0.1)}, {("device", "ep"): 0.5}, 2, 0.4, {}, 1.5)
    device = DeviceCost({("experts", "forward"): AlphaBeta(1e-5, 1e-6)}, 0.4)
    return Plan(SETTING, links, {SHAPE.kind: device}, {SHAPE: choice})


def test_it_survives_a_checkpoint_that_is_read_with_weights_only():
    file = io.BytesIO()
    torch.save(plan().as_dict(), file)
    file.seek(0)
    assert Plan.from_dict(torch.load(file, weights_only=True)) == plan()


def test_it_survives_a_file(tmp_path):
    path = tmp_path / "folder" / "plan.json"
    plan().save(path)
    assert Plan.load(path, SETTING) == plan()
    assert [each.name for each in path.parent.iterdir()] == ["plan.json"]  # nothing half written is left


@pytest.mark.parametrize(
    "change",
    [
        {"hosts": ["a: cpu", "c: cpu"]},
        {"hosts": ["a: cpu", "b: NVIDIA H200"]},
        {"world_size": 4},
        {"sizes": {"model_parallel": 1, "expert_parallel": 2, "expert_sharding": 1}},
        {"backend": "nccl"},
        {"torch": "2.14.0"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_file_of_another_setting_does_not_hold(tmp_path, change):
    path = tmp_path / "plan.json"
    plan().save(path)
    now = {**SETTING, **change}
    assert Plan.load(path, now) == Plan(now)


def test_another_dtype_is_another_layer():
    of_kind = plan()
    other = LayerShape(**{**SHAPE.as_dict(), "dtype": "float32", "token_dtype": None})
    assert other not in of_kind.choices
    assert other.kind not in of_kind.devices
    # Another number of tokens is another shape, of the same kind.
    longer = LayerShape(**{**SHAPE.as_dict(), "tokens": 128})
    assert longer not in of_kind.choices
    assert longer.kind in of_kind.devices


def damaged():
    whole = plan().as_dict()
    return [
        "",
        "{",
        "[]",
        json.dumps({**whole, "schema": 0}),
        json.dumps({**whole, "choices": [{}]}),
        json.dumps({key: value for key, value in whole.items() if key != "links"}),
        json.dumps(whole).replace("s1_hier/4", "s9"),
    ]


@pytest.mark.parametrize("text", damaged())
def test_a_damaged_file_is_told_and_measured_anew(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert Plan.load(path, SETTING) == Plan(SETTING)


def test_where_there_is_no_file_there_is_no_plan(tmp_path):
    assert Plan.load(tmp_path / "none.json", SETTING) == Plan(SETTING)


def test_the_setting_of_one_process_names_host_sizes_and_torch():
    setting = setting_of(MoETopology(MoESizes()), torch.device("cpu"))
    assert setting["world_size"] == 1
    assert setting["torch"] == torch.__version__
    assert len(setting["hosts"]) == 1
    assert json.loads(json.dumps(setting)) == setting


def test_a_choice_is_explained_in_one_sentence():
    text = explain(plan().choices[SHAPE])
    assert text == (
        "s1_hier/4 for 64 tokens: the fastest of those tried, 310.0 ms forward and backward, most of it all-to-all "
        "over EP."
    )
    predicted = Choice(
        SHAPE, schedule_named("s1_hier/4"), "predicted to be the fastest", plan().choices[SHAPE].predictions
    )
    assert explain(predicted).endswith(
        "300.0 ms forward and backward, most of it all-to-all over EP; next s2 with 500.0 ms."
    )
