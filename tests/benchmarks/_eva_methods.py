"""The methods of the convergence benchmark as a table; to compare one more, add a `Method` to it.

Weight decay is 0 for all. `hidden` are the weights and biases of linear and convolution layers other than `lm_head`.
"""

from dataclasses import dataclass, field, replace

from torch.optim import SGD

from tests.benchmarks._eva_builders import (
    Build,
    adamw,
    control,
    eva,
    eva_p,
    foof,
    muon,
    shampoo,
    soap,
    two_adamw,
)

BASELINE = "AdamW"


@dataclass(frozen=True)
class Knob:
    """A setting beside the learning rate: the values of the first grid, and how the search moves on from one.

    Attributes:
        start: the first grid. Empty: the best learning rate of AdamW on the task, tuned before.
        per_decade: values per factor of ten on the ladder that the search moves along.
        choices: the only values there are, in order, in place of a ladder.
        unused: tasks in which nothing depends on it.
    """

    start: tuple[float, ...] = ()
    per_decade: int = 2
    choices: tuple[float, ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """What is tuned and compared.

    Attributes:
        name: in the tables.
        about: one line for the page.
        build: makes the optimizers that step together, from the model and ``{"lr": ..., **knobs}``.
        lr: by task, the middle of the first grid.
        knobs: what is tuned beside it.
        missing: by task, why the method has no row.
        period: steps after which the work of a step repeats, or the knob that says it.
    """

    name: str
    about: str
    build: Build
    lr: dict[str, float]
    knobs: dict[str, Knob] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    period: int | str = 1

    def on(self, task: str) -> "Method":
        """Return the method with the knobs that do something in the task."""
        return replace(self, knobs={name: knob for name, knob in self.knobs.items() if task not in knob.unused})


def lrs(autoencoder: float, llama: float, resnet: float) -> dict[str, float]:
    return {"autoencoder": autoencoder, "llama": llama, "resnet": resnet}


ALL = {"kv_samples": None, "g_scale": "expectation"}
EVA_F = {"variant": "eva_f", **ALL, "fallback": "adamw"}
MOMENTUM = Knob((0.9,), choices=(0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98))
POWER_MOMENTUM = replace(MOMENTUM, start=(0.8,))
DAMPING, CLIP, CONTROL_CLIP, REST = Knob((0.03,)), Knob((1e-3, 0.1)), Knob((0.03, 3.0)), Knob(per_decade=6)
FALLBACK = replace(REST, unused=("autoencoder",))  # which has layers only
ONE_RULE = "every layer is hidden: the same as the method without AdamW"
NO_HYBRID = {"autoencoder": ONE_RULE}
NO_CONV = {"resnet": "torch.optim.Muon takes matrices only"}

_TABLE = (
    Method(
        "SGD",
        "`torch.optim.SGD(fused=True)`; lr and momentum tuned",
        lambda net, p: [SGD(net.parameters(), p["lr"], momentum=p["momentum"], fused=True)],
        lrs(1.0, 0.2, 0.1),
        {"momentum": MOMENTUM},
    ),
    Method(
        BASELINE,
        "`torch.optim.AdamW(fused=True)`; lr and both betas tuned",
        adamw,
        lrs(0.005, 0.01, 0.02),
        {
            "beta1": Knob((0.9,), choices=(0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
            "beta2": Knob((0.999,), choices=(0.9, 0.95, 0.99, 0.999, 0.9999)),
        },
    ),
    Method(
        "AdamW, two learning rates",
        "AdamW with a learning rate of its own for all but the hidden layers, as Muon and EvaP have it; both learning "
        "rates and beta1 tuned",
        two_adamw,
        lrs(0.005, 0.005, 0.02),
        {"rest_lr": REST, "beta1": Knob((0.8,), choices=(0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95))},
        NO_HYBRID,
    ),
    Method(
        "Muon + AdamW",
        "`torch.optim.Muon` for hidden matrices, AdamW for the rest; both learning rates and momentum tuned",
        muon,
        lrs(0.02, 0.02, 0.02),
        {"rest_lr": REST, "momentum": Knob((0.95,), choices=(0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98))},
        NO_CONV,
    ),
    Method(
        "SOAP",
        "`pytorch_optimizer.SOAP`, eigenbasis every 10 steps; lr and beta tuned",
        soap,
        lrs(0.005, 0.01, 0.01),
        {"beta": Knob((0.95,), choices=(0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98))},
        period=10,
    ),
    Method(
        "Shampoo",
        "`pytorch_optimizer.ScalableShampoo`, RMSProp grafting, roots every 10 steps; lr and both betas tuned",
        shampoo,
        lrs(0.0005, 0.0005, 0.0005),
        {
            "beta1": Knob((0.9,), choices=(0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
            "beta2": Knob((0.99,), choices=(0.9, 0.95, 0.99, 0.999)),
        },
        period=10,
    ),
    Method(
        "FOOF",
        "the full input moment of which Eva-f keeps one vector: own implementation, all samples, KL clip, eigenbasis "
        "every 50 or 10 steps; lr, damping, clip, momentum and this number tuned",
        foof,
        lrs(0.1, 0.05, 0.05),
        {"damping": DAMPING, "kl_clip": CLIP, "momentum": MOMENTUM, "every": Knob((50,), choices=(10, 50))},
        period="every",
    ),
    Method(
        "Eva published",
        "`Eva` with the constructor's conventions: 16 samples, KL clip; lr, damping, clip and momentum tuned",
        eva(),
        lrs(0.1, 0.05, 0.05),
        {"kl_clip": CLIP, "damping": DAMPING, "momentum": MOMENTUM},
    ),
    Method(
        "control: SGD + KL clip",
        "Eva without its rank-1 term; lr, clip and momentum tuned",
        control(head=True, clip=True, rest="sgd"),
        lrs(3.0, 1.0, 1.0),
        {"kl_clip": CONTROL_CLIP, "momentum": MOMENTUM},
    ),
    Method(
        "Eva expectation, relative, normalised",
        "all samples, `g_scale='expectation'`, `damping_mode='relative'`, `rescale='normalize'`; lr, damping and "
        "momentum tuned",
        eva(variant="eva", **ALL, damping_mode="relative", rescale="normalize"),
        lrs(0.03, 0.03, 0.03),
        {"damping": Knob((0.3,)), "momentum": MOMENTUM},
    ),
    Method(
        "control: normalised SGD",
        "the normalised variants without their rank-1 term; lr and momentum tuned",
        control(head=True, clip=False, rest="sgd"),
        lrs(0.03, 0.03, 0.03),
        {"momentum": MOMENTUM},
    ),
    Method(
        "Eva-s published",
        "`variant='eva_s'` with its published settings; lr, damping and momentum tuned",
        eva(variant="eva_s"),
        lrs(1.0, 0.2, 0.1),
        {"damping": DAMPING, "momentum": MOMENTUM},
    ),
    Method(
        "Eva-f published",
        "`variant='eva_f'`, 16 samples, normalised; lr, damping and momentum tuned",
        eva(variant="eva_f"),
        lrs(0.03, 0.03, 0.03),
        {"damping": DAMPING, "momentum": MOMENTUM},
    ),
    Method(
        "Eva-f",
        "`variant='eva_f'`, all samples, KL clip, AdamW for embeddings and norms; lr, damping, clip, momentum and "
        "AdamW's lr tuned",
        eva(**EVA_F, rescale="clip"),
        lrs(0.1, 0.05, 0.05),
        {"damping": DAMPING, "kl_clip": CLIP, "momentum": MOMENTUM, "rest_lr": FALLBACK},
    ),
    Method(
        "Eva-f relative, normalised",
        "as Eva-f, with `damping_mode='relative', rescale='normalize'`; lr, damping, momentum and AdamW's lr tuned",
        eva(**EVA_F, damping_mode="relative", rescale="normalize"),
        lrs(0.03, 0.03, 0.03),
        {"damping": Knob((0.1,)), "momentum": MOMENTUM, "rest_lr": FALLBACK},
    ),
    Method(
        "Eva-f hidden + AdamW",
        "as Eva-f, with the head on AdamW too (`attach(model, skip=['*lm_head'])`); the same settings tuned",
        eva(**EVA_F, rescale="clip", skip_head=True),
        lrs(0.1, 0.05, 0.05),
        {"damping": DAMPING, "kl_clip": CLIP, "momentum": MOMENTUM, "rest_lr": FALLBACK},
        {**NO_HYBRID, "resnet": "no `lm_head`: the same as Eva-f"},
    ),
    Method(
        "control: SGD + KL clip hidden + AdamW",
        "Eva-f hidden + AdamW without its rank-1 term; lr, clip, momentum and AdamW's lr tuned",
        control(head=False, clip=True, rest="adamw"),
        lrs(3.0, 1.0, 1.0),
        {"kl_clip": CONTROL_CLIP, "rest_lr": FALLBACK, "momentum": MOMENTUM},
        NO_HYBRID,
    ),
    Method(
        "control: normalised SGD hidden + AdamW",
        "Eva-f relative without its rank-1 term, head on AdamW; both learning rates and momentum tuned",
        control(head=False, clip=False, rest="adamw"),
        lrs(0.03, 0.03, 0.03),
        {"rest_lr": FALLBACK, "momentum": MOMENTUM},
        NO_HYBRID,
    ),
    Method(
        "EvaP, rank 1",
        "`EvaP(rank=1)`, head and all but layers on AdamW; both learning rates and momentum tuned",
        eva_p(rank=1),
        lrs(0.02, 0.02, 0.02),
        {"rest_lr": REST, "momentum": POWER_MOMENTUM},
    ),
    Method(
        "EvaP, rank 4",
        "`EvaP(rank=4)`; the same settings tuned",
        eva_p(rank=4),
        lrs(0.02, 0.02, 0.02),
        {"rest_lr": REST, "momentum": POWER_MOMENTUM},
    ),
    Method(
        "control: EvaP, rank 0",
        "`EvaP(rank=0)`: rows brought to equal length, no leading direction taken away; the same settings tuned",
        eva_p(rank=0),
        lrs(0.01, 0.01, 0.01),
        {"rest_lr": REST, "momentum": POWER_MOMENTUM},
    ),
)

METHODS = {method.name: method for method in _TABLE}
