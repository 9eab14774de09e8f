"""How the convergence benchmark builds the optimizers of a method, from a model and the settings that are tuned.

Weight decay is 0 for all. `hidden` are the weights and biases of linear and convolution layers other than `lm_head`.
"""

from collections.abc import Callable

from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from lightning_efficient.optimizers import Eva, EvaP
from tests.benchmarks._eva_baselines import FOOF, ScaledSGD, hidden_layers, split_parameters

Params = dict[str, float]
Build = Callable[[nn.Module, Params], list[Optimizer]]


def adamw(net: nn.Module, p: Params) -> list[Optimizer]:
    return [AdamW(net.parameters(), p["lr"], betas=(p["beta1"], p["beta2"]), weight_decay=0, fused=True)]


def two_adamw(net: nn.Module, p: Params) -> list[Optimizer]:
    inside, outside = split_parameters(net, hidden_layers(net, head=False))
    groups = [{"params": inside, "lr": p["lr"]}, {"params": outside, "lr": p["rest_lr"]}]
    return [AdamW(groups, betas=(p["beta1"], 0.999), weight_decay=0, fused=True)]


def muon(net: nn.Module, p: Params) -> list[Optimizer]:
    matrices = [layer.weight for layer in hidden_layers(net, head=False)]
    rest = [q for q in net.parameters() if not any(q is w for w in matrices)]
    return [
        Muon(matrices, p["lr"], momentum=p["momentum"], weight_decay=0),
        AdamW(rest, p["rest_lr"], weight_decay=0, fused=True),
    ]


def soap(net: nn.Module, p: Params) -> list[Optimizer]:
    from pytorch_optimizer import SOAP

    return [SOAP(net.parameters(), p["lr"], betas=(p["beta"], p["beta"]), weight_decay=0, precondition_frequency=10)]


def shampoo(net: nn.Module, p: Params) -> list[Optimizer]:
    from pytorch_optimizer import ScalableShampoo

    return [
        ScalableShampoo(
            net.parameters(),
            p["lr"],
            betas=(p["beta1"], p["beta2"]),
            start_preconditioning_step=10,
            preconditioning_compute_steps=10,
            graft_type=3,  # RMSProp's step size
        )
    ]


def foof(net: nn.Module, p: Params) -> list[Optimizer]:
    settings = {name: p[name] for name in ("damping", "kl_clip", "momentum")}
    return [FOOF(net, p["lr"], every=int(p["every"]), **settings)]


def eva(*, skip_head: bool = False, **fixed: object) -> Build:
    """Return a builder of Eva; knobs go to its constructor, ``rest_lr`` as ``fallback_lr``."""

    def build(net: nn.Module, p: Params) -> list[Optimizer]:
        tuned = {{"rest_lr": "fallback_lr"}.get(name, name): value for name, value in p.items()}
        optimizer = Eva(net.parameters(), **{**fixed, **tuned})  # type: ignore[arg-type]
        has_head = any(name.endswith("lm_head") for name, _ in net.named_modules())
        return [optimizer.attach(net, skip=["*lm_head"] if skip_head and has_head else [])]

    return build


def eva_p(*, rank: int) -> Build:
    """Return a builder of EvaP; its head, where there is one, is on AdamW."""

    def build(net: nn.Module, p: Params) -> list[Optimizer]:
        optimizer = EvaP(net.parameters(), p["lr"], rank=rank, momentum=p["momentum"], fallback_lr=p["rest_lr"])
        has_head = any(name.endswith("lm_head") for name, _ in net.named_modules())
        return [optimizer.attach(net, skip=["*lm_head"] if has_head else [])]

    return build


def control(*, head: bool, clip: bool, rest: str) -> Build:
    """Return a builder of :class:`ScaledSGD` for the layers and SGD or AdamW for the rest."""

    def build(net: nn.Module, p: Params) -> list[Optimizer]:
        inside, outside = split_parameters(net, hidden_layers(net, head=head))
        optimizers: list[Optimizer] = [
            ScaledSGD(inside, p["lr"], kl_clip=p["kl_clip"] if clip else None, momentum=p["momentum"])
        ]
        if outside and rest == "adamw":
            optimizers.append(AdamW(outside, p["rest_lr"], weight_decay=0, fused=True))
        elif outside:
            optimizers.append(SGD(outside, p["lr"], momentum=p["momentum"], fused=True))
        return optimizers

    return build
