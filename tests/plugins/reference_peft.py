"""An adapter of peft trained by hand: its own layers, and torch's gradients of the joint batch."""

from typing import Any

import torch

from tests.plugins.references import Reference, Step
from tests.plugins.tiny import Batch, MakeOptimizer, TinyModule


def peft_by_hand(config: dict[str, Any], *, seed: int, optimizer: MakeOptimizer) -> Reference:
    def on(module: TinyModule) -> Step:
        import peft

        torch.manual_seed(seed)
        peft.inject_adapter_in_model(peft.get_peft_config(dict(config)), module.net)
        trained = [each for each in module.parameters() if each.requires_grad]
        update = optimizer(iter(trained))

        def step(shares: list[Batch]) -> None:
            x, y = (torch.cat(parts) for parts in zip(*shares, strict=True))
            for parameter, gradient in zip(trained, torch.autograd.grad(module.loss((x, y)), trained), strict=True):
                parameter.grad = gradient
            update.step()

        return step

    return on
