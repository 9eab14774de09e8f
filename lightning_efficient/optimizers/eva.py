"""`Eva`: the optimizer around the technique of :mod:`lightning_efficient.eva`."""

import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_efficient.eva.backends import make_step
from lightning_efficient.eva.capture import GScale
from lightning_efficient.eva.config import (
    PUBLISHED_NEW_WEIGHT,
    PUBLISHED_RESCALE,
    Backend,
    EvaConfig,
    Fallback,
    fallback_ratio,
)
from lightning_efficient.eva.layers import FoundLayers
from lightning_efficient.eva.plan import Plan
from lightning_efficient.eva.precondition import DampingMode, Rescale, Variant
from lightning_efficient.eva.report import LayerReport, layer_reports
from lightning_efficient.eva.sources import GradientVectors, LayerVectors, States, bare_layers
from lightning_efficient.optimizers.fallback import adamw_step, momentum_buffer, sgd_step
from lightning_efficient.optimizers.layerwise import LayerwiseOptimizer, evaluate


@dataclass(frozen=True)
class EvaStats:
    """What an :class:`Eva` has done. Reading it waits for the device.

    Attributes:
        counted_steps: steps that preconditioned layers, since the optimizer was made.
        kv_updates: steps that renewed the Kronecker vectors.
        skipped_kv: steps whose vectors were not finite and were dropped.
        clipped: steps that the KL clip made shorter.
    """

    counted_steps: int
    kv_updates: int
    skipped_kv: int
    clipped: int


class Eva(LayerwiseOptimizer):
    r"""Kronecker-vectorised second-order optimization at about the cost of SGD with momentum.

    The gradient :math:`G` of each ``Linear`` and convolution weight, with the bias as one more column, is replaced by

    .. math::
        V = F^{-1} G, \qquad
        F = \begin{cases}
            (a a^\top) \otimes (g g^\top) + \gamma I & \text{eva} \\
            a a^\top + \gamma I \text{ on the inputs} & \text{eva\_f}
        \end{cases}

    where :math:`a` is the layer's mean input and :math:`g` its mean output gradient, captured while the module trains;
    Eva-s takes means of :math:`G` itself. Then :math:`M \leftarrow \mu M + \nu V + \lambda W` and
    :math:`W \leftarrow W - \eta M`, with one factor :math:`\nu` for the whole model (``rescale``). All other parameters
    (embeddings, norms, tied or skipped weights) follow the fallback rule, inside this optimizer.

    The defaults are the published ones, and **with them the curvature term hardly does anything**: see the method card.
    What works: ``variant="eva_f", kv_samples=None, rescale="clip", fallback="adamw"``. For ``eva``, set
    ``g_scale="expectation"`` too.
    While the KL clip is active, the learning rate drops out of the step of the preconditioned layers.

    Eva and Eva-f need the module: call :meth:`attach`, or add
    :class:`~lightning_efficient.callbacks.AttachOptimizer` to the Trainer. Under data parallelism the vectors are
    averaged by one all-reduce for each step, none while gradients accumulate.

    Args:
        params: parameters or groups. A group may set ``lr``, ``damping``, ``momentum``, ``nesterov``, ``weight_decay``,
            ``decoupled_weight_decay``, ``betas``, ``eps``, ``fallback_lr``; and ``fallback: True``, which sends all of
            it to the fallback rule, at the ``lr`` that it sets.
        lr: learning rate, :math:`\eta`.
        variant: ``"eva"``, ``"eva_f"`` (inputs only: no output gradient is needed) or ``"eva_s"`` (gradients only: no
            module is needed).
        damping: :math:`\gamma`.
        damping_mode: ``"absolute"``, or ``"relative"``: :math:`\gamma` is this multiple of each layer's own curvature,
            and V is not divided by it.
        kl_clip: :math:`\kappa` of the clip; ``None``: no clip.
        rescale: what sets :math:`\nu`: ``"clip"``: :math:`\min(1, \sqrt{\kappa / \sum \eta^2 \langle V, G\rangle})`;
            ``"normalize"``: :math:`1/\sqrt{\sum \langle V, G\rangle}`; ``"match_grad"``: the norm of the gradients;
            ``"graft"``: that of each layer's; ``"none"``. ``None``: the published one, in this order for eva, eva_f and
            eva_s: clip, normalize, graft.
        kv_new_weight: weight of the newest vectors in their average, :math:`\xi`; ``"sum"`` adds them up. ``None``: the
            published one, 0.95, and ``"sum"`` for eva_s.
        kv_samples: samples of each batch that the vectors see; ``None``: all.
        kv_every: steps between captures.
        g_scale: for ``eva`` only. ``"reference"``: output gradients of a mean loss are averaged again, as published;
            ``"expectation"``: they are summed, so that g is the gradient of the bias and no way to split the batch
            changes it.
        momentum: :math:`\mu`.
        nesterov: look ahead along the momentum.
        weight_decay: :math:`\lambda`.
        decoupled_weight_decay: shrink the weights by :math:`1 - \eta\lambda` instead of adding :math:`\lambda W`.
        fallback: ``"sgd"``, or ``"adamw"``, whose decay is decoupled.
        fallback_lr: its learning rate; the ratio to ``lr`` stays, whatever a schedule does. ``None``: ``lr``.
        betas: of AdamW.
        eps: of AdamW.
        backend: ``"eager"``, ``"compiled"`` (inductor) or ``"triton"``.
        process_group: whose ranks hold the same model; ``None``: all.

    Attributes:
        config: the settings that are the same for all groups.
        loss_scale: returns what the loss is multiplied with, ``GradScaler.get_scale`` for one; None: nothing.
        nu: :math:`\nu` of the last step, a scalar on the device.

    Raises:
        ValueError: a value is out of range or unknown.
        TypeError: a parameter is complex, or ``lr`` is a tensor.
        NotImplementedError: a parameter is sharded (a DTensor).

    Sources: Zhang, Shi and Li, ICLR 2023, section 3 (eva); arXiv 2308.02123 (eva_f, eva_s).

    Example::

        optimizer = Eva(model.parameters(), lr=0.1, variant="eva_f", kv_samples=None, fallback="adamw").attach(model)
    """

    _wide_keys = ("kv_a", "kv_g")
    _settings = ("config", "process_group")
    _source: LayerVectors | GradientVectors | None
    _plans: dict[tuple[bool, ...], Plan]
    _seen: set[tuple[bool, ...]]
    _lacking: bool
    _step_function: Callable[..., Any] | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        *,
        variant: Variant = "eva",
        damping: float = 0.03,
        damping_mode: DampingMode = "absolute",
        kl_clip: float | None = 1e-3,
        rescale: Rescale | None = None,
        kv_new_weight: float | Literal["sum"] | None = None,
        kv_samples: int | None = 16,
        kv_every: int = 1,
        g_scale: GScale = "reference",
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        fallback: Fallback = "sgd",
        fallback_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        backend: Backend = "eager",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config = EvaConfig(
            variant=variant,
            damping_mode=damping_mode,
            kl_clip=kl_clip,
            rescale=rescale or PUBLISHED_RESCALE.get(variant, "clip"),
            kv_new_weight=PUBLISHED_NEW_WEIGHT.get(variant, 0.95) if kv_new_weight is None else kv_new_weight,
            kv_samples=kv_samples,
            kv_every=kv_every,
            g_scale=g_scale,
            fallback=fallback,
            backend=backend,
        )
        self.process_group = process_group
        self.loss_scale: Callable[[], Tensor | float | None] | None = None
        self.nu: Tensor | None = None
        self._counts: Tensor | None = None
        self._counted_steps = self._kv_updates = 0
        self._source = None
        defaults = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "fallback": False,
            "fallback_ratio": fallback_ratio(fallback_lr, lr),
            "betas": tuple(betas),
            "eps": eps,
            "steps": 0,
        }
        super().__init__(params, defaults)

    # ---- the module ------------------------------------------------------------------------------------------------

    @property
    @override
    def needs_module(self) -> bool:
        """Whether :meth:`attach` must be called before the first step: for eva and eva_f."""
        return self.config.needs_module

    @override
    def _watch(self, found: FoundLayers) -> None:
        source: LayerVectors | GradientVectors | None
        if self.needs_module:
            source = LayerVectors(found.layers, self.config, self.process_group)
        else:
            source = self._gradient_vectors(found.names, found.skipped)
        if source is not None:
            source.check(self._states(source))
            source.watch()
        self._source = source
        self._plan_capture()

    @override
    def _unwatch(self) -> None:
        if self._source is not None:
            self._source.remove()
        self._source, self._plans, self._seen, self._step_function = None, {}, set(), None
        self._lacking = False

    @override
    def _reasons_of(self, found: FoundLayers) -> dict[str, str]:
        if self.needs_module:
            return found.reasons
        return {name: reason for name, reason in found.reasons.items() if reason.startswith("skip")}

    def _gradient_vectors(self, names: dict[int, str], skipped: Collection[int] = ()) -> GradientVectors | None:
        layers = bare_layers(self.param_groups, names, skipped)
        return GradientVectors(layers, self.config) if layers else None

    # ---- steps -----------------------------------------------------------------------------------------------------

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the vectors that belong to them."""
        super().zero_grad(set_to_none)
        if self._source is not None:
            self._source.clear()

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            RuntimeError: no module is attached, or an active layer's vectors were not captured; on all ranks.
            TypeError: a gradient is sparse.
        """
        source = self._get_source()
        loss = evaluate(closure)
        if source is not None:
            with torch.autocast(source.device.type, enabled=False):
                self._precondition(source)
        else:
            self._follow_fallback(set())
        for group in self.param_groups:
            group["steps"] += 1
        self._set_capturing()
        return loss

    def _get_source(self) -> LayerVectors | GradientVectors | None:
        if self._source is None and self.needs_module:
            raise RuntimeError(
                f"Eva(variant={self.config.variant!r}) needs layer inputs: call optimizer.attach(model) or add "
                "AttachOptimizer to Trainer(callbacks=...)."
            )
        if self._source is None and not self.attached:
            self._source = self._gradient_vectors({})
        return self._source

    def _precondition(self, source: LayerVectors | GradientVectors) -> None:
        self._check_dense()
        active = [layer.weight.grad is not None for layer in source.layers]
        biased = [layer.bias is not None and layer.bias.grad is not None for layer in source.layers]
        states = [self.state[layer.weight] for layer in source.layers]
        finite = self._refresh(source, states, active, (*active, *biased))
        if not any(active):
            self._follow_fallback(set())
            return
        plan = self._plan(source, active, biased)
        a_A, g_R = source.vectors(states, active)
        momenta = [
            momentum_buffer(layer.weight, self.state) if self.param_groups[index]["momentum"] else None
            for layer, index in zip(plan.layers, plan.group_indices, strict=True)
        ]
        if self._step_function is None:
            self._step_function = make_step(self.config.backend, source.device)
        self.nu, bias_R = self._step_function(
            plan.tensors(a_A, momenta),
            plan.groups(self.param_groups, as_tensors=self.config.backend == "compiled"),
            a_A=a_A,
            g_R=g_R,
            bias_grad_R=plan.bias_grads(),
            has_bias_S=plan.has_bias_S,
            damping_L=plan.damping(self.param_groups),
            layout=plan.layout,
            rule=self.config.rule,
        )
        self._count(finite, self.nu)
        done = {id(layer.weight) for layer in plan.layers} | self._update_biases(plan, bias_R)
        self._follow_fallback(done)

    def _refresh(
        self,
        source: LayerVectors | GradientVectors,
        states: States,
        active: list[bool],
        signature: tuple[bool, ...],
    ) -> Tensor | None:
        """Bring the vectors up to date; return whether they were finite, None if it is not their turn."""
        if not self._is_due():
            return None
        self._lacking = False
        self._kv_updates += 1
        if isinstance(source, GradientVectors):
            return source.refresh(states, active) if any(active) else None
        source.reduce()
        if signature not in self._seen and (unseen := source.unseen(active)):
            raise RuntimeError(
                f"The layers {', '.join(unseen)} have gradients but no Kronecker vectors: their hooks did not run. "
                "Causes: attach() came after the first call of the compiled model (attach before); the module was in "
                "eval mode; its weight was used without calling it; or torch.autograd.grad computed the gradients (use "
                f"backward). Or leave them out: attach(model, skip=[{unseen[0]!r}])."
            )
        self._seen.add(signature)
        return source.refresh(states, None if self.loss_scale is None else self.loss_scale())

    def _plan(self, source: LayerVectors | GradientVectors, active: list[bool], biased: list[bool]) -> Plan:
        signature = (*active, *biased)
        if signature not in self._plans:
            group_of = self._group_of()
            chosen = [i for i, is_active in enumerate(active) if is_active]
            layers = [source.layers[i] for i in chosen]
            self._plans[signature] = Plan(
                layers,
                [group_of[id(layer.weight)] for layer in layers],
                [biased[i] for i in chosen],
                dtype=source.dtype,
                device=source.device,
            )
        return self._plans[signature]

    def _update_biases(self, plan: Plan, bias_R: Tensor | None) -> set[int]:
        """Let SGD apply what took the place of the biases' gradients; return which biases."""
        if bias_R is None:
            return set()
        replaced = {
            id(bias): part.to(bias.dtype)
            for bias, part in zip(plan.biases, bias_R.split(plan.layout.output_sizes), strict=True)
            if bias is not None
        }
        for group in self.param_groups:
            biases = [p for p in group["params"] if id(p) in replaced]
            sgd_step(biases, [replaced[id(p)] for p in biases], self.state, group, lr=group["lr"])
        return set(replaced)

    def _follow_fallback(self, done: set[int]) -> None:
        for group in self.param_groups:
            rest = [p for p in group["params"] if id(p) not in done and p.grad is not None]
            lr = group["lr"] * group["fallback_ratio"]
            if self.config.fallback == "adamw":
                adamw_step(rest, self.state, group, lr=lr)
            else:
                sgd_step(rest, [p.grad for p in rest], self.state, group, lr=lr)

    def _plan_capture(self) -> None:
        """Capture in the coming step if it is its turn, or if a layer has no vectors yet."""
        source = self._source
        self._lacking = source is not None and any("kv_a" not in state for state in self._states(source))
        self._set_capturing()

    def _is_due(self) -> bool:
        return self._lacking or self.param_groups[0]["steps"] % self.config.kv_every == 0

    def _set_capturing(self) -> None:
        if self._source is not None:
            self._source.capture(self._is_due())

    def _states(self, source: LayerVectors | GradientVectors) -> States:
        return [self.state.get(layer.weight, {}) for layer in source.layers]

    # ---- what it did -----------------------------------------------------------------------------------------------

    def _count(self, finite: Tensor | None, nu: Tensor) -> None:
        self._counted_steps += 1
        clipped = nu < 1 if self.config.rescale == "clip" else torch.zeros_like(nu, dtype=torch.bool)
        dropped = torch.zeros_like(clipped) if finite is None else ~finite
        events = torch.stack((dropped, clipped))
        self._counts = events.to(torch.int64) if self._counts is None else self._counts + events

    @property
    def stats(self) -> EvaStats:
        """What was done since the optimizer was made."""
        dropped, clipped = (0, 0) if self._counts is None else self._counts.tolist()
        return EvaStats(self._counted_steps, self._kv_updates, dropped, clipped)

    def kv_report(self) -> dict[str, LayerReport]:
        """Say for each layer what its preconditioner does, and for each other parameter why it has none.

        Waits for the device. Empty before :meth:`attach` and, for Eva-s, before the first step.
        """
        report = {name: LayerReport(skipped=reason) for name, reason in self._reasons.items()}
        source = self._source
        if source is not None:
            damping = [group["damping"] for group in self.param_groups]
            report.update(layer_reports(source, self._states(source), self._group_of(), damping, self.config))
        return report

    # ---- state -----------------------------------------------------------------------------------------------------

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; Kronecker vectors keep their type, whatever that of the weights.

        A state without vectors (of SGD, say) starts them anew, with a warning.

        Raises:
            ValueError: the state belongs to other shapes.
        """
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        if any("momentum_buffer" in each for each in saved.values()) and not any("kv_a" in e for e in saved.values()):
            warnings.warn(
                "The optimizer state has momentum but no Kronecker vectors (it was not saved by Eva): they start anew. "
                "Resume from a checkpoint of Eva to continue exactly.",
                stacklevel=2,
            )
        if self._source is not None:
            self._source.check(self._states(self._source))
        self._plan_capture()

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        if not hasattr(self, "_source"):  # a copy
            self._source, self.nu, self._counts, self.loss_scale = None, None, None, None
            self._counted_steps = self._kv_updates = 0
        super().__setstate__(state)
