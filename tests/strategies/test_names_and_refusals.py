"""The names a Trainer knows, and the settings the strategy refuses before any process starts."""

from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

import lightning_efficient
from lightning_efficient.compression import ACPSGD, COMPRESSORS
from lightning_efficient.strategies import CompressedDDPStrategy, register

NAMES = ["acp_sgd", "power_sgd", "top_k", "sign_sgd"]


def trainer(strategy: str) -> Trainer:
    return Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)


@pytest.mark.parametrize("name", [*NAMES, "ACP_SGD"])
def test_a_name_gives_its_compressor_to_each_trainer_anew(name: str) -> None:
    first, second = trainer(name).strategy, trainer(name).strategy
    assert isinstance(first, CompressedDDPStrategy)
    assert isinstance(second, CompressedDDPStrategy)
    assert type(first.compressor) is COMPRESSORS[name.lower()]
    assert first.compressor is not second.compressor
    assert not dist.is_initialized()


def test_registering_again_changes_nothing() -> None:
    before = dict(StrategyRegistry)
    register()
    assert dict(StrategyRegistry) == before
    assert set(NAMES) <= before.keys()


def test_every_name_says_what_it_is() -> None:
    assert all(StrategyRegistry[name]["description"] for name in NAMES)


def test_the_default_is_acp_sgd() -> None:
    assert type(CompressedDDPStrategy().compressor) is ACPSGD
    assert lightning_efficient.CompressedDDPStrategy is CompressedDDPStrategy


def test_a_compressor_may_be_given_by_name() -> None:
    assert CompressedDDPStrategy("half").compressor.method == "half"


@pytest.mark.parametrize(
    "setting",
    [
        {"ddp_comm_hook": print},
        {"ddp_comm_state": object()},
        {"ddp_comm_wrapper": print},
        {"model_averaging_period": 4},
        {"skip_all_reduce_unused_params": True},
        {"delay_all_reduce_named_params": [("a", None)]},
        {"param_to_hook_all_reduce": object()},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_what_ddp_alone_would_take_over_is_refused(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name} cannot be set with gradient compression: .* Leave {name} out"):
        CompressedDDPStrategy(**setting)


def test_an_unknown_argument_is_named_at_once() -> None:
    with pytest.raises(TypeError, match="unexpected argument 'bucket_cap'"):
        CompressedDDPStrategy(bucket_cap=25)


def test_ddps_own_arguments_pass() -> None:
    CompressedDDPStrategy(bucket_cap_mb=4, find_unused_parameters=True, gradient_as_bucket_view=True)


def test_an_unknown_compressor_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match="unknown compressor 'acp': the names are acp_sgd, power_sgd, top_k"):
        CompressedDDPStrategy("acp")


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="replica_check_every_n_steps is -1"):
        CompressedDDPStrategy(replica_check_every_n_steps=-1)
