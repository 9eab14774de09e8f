"""What a module is in its model, told by its class and its name: for the table by role."""

from __future__ import annotations

import re

from torch import nn

_BY_CLASS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), "embedding"),
    ((nn.RNNBase, nn.RNNCellBase), "rnn"),
    ((nn.modules.conv._ConvNd,), "convolution"),
    ((nn.modules.loss._Loss,), "loss"),
)
# The first pattern that fits the last names of a path, or the class, decides; parents lend their role to children.
_BY_NAME: tuple[tuple[str, str], ...] = (
    (r"lora_|adapter", "adapter"),
    (r"norm|(^|\.)ln_?\w{0,2}$", "norm"),
    (r"rotary|rope", "rope"),
    (r"router|gating|(^|\.)gate$", "router"),
    (r"expert", "expert"),
    (
        r"(^|[._])(q|k|v|query|key|value|qkv|wqkv)(_?(proj|lin))?$|c_attn$|in_proj$|query_key_value$",
        "qkv",
    ),
    (r"att\w*\.(\w+\.)*(o|out|c|output|dense)(_?(proj|lin))?(\.dense)?$|(^|\.)o_proj$", "out_proj"),
    (r"att(n|ention)", "attention"),
    (r"mlp|ffn|feed_?forward|(gate|up|down)_proj$|swiglu|intermediate|(^|\.)fc\d?$|(^|\.)linear\d$", "mlp"),
    (r"lm_head|(^|\.)head|classifier|score$|decoder$", "head"),
    (r"embed|(^|\.)wte$|(^|\.)wpe$", "embedding"),
    (r"dropout|relu|gelu|silu|sigmoid|tanh|softmax|(^|\.)act", "activation"),
    (r"pool", "pooling"),
)
_COMPILED = tuple((re.compile(pattern), role) for pattern, role in _BY_NAME)


def role_of(path: str, module: nn.Module) -> str:
    """Return what a module is: ``embedding``, ``norm``, ``qkv``, ``rope``, ``attention``, ``out_proj``, ``mlp``,
    ``router``, ``expert``, ``adapter``, ``head``, ``convolution``, ``rnn``, ``activation``, ``pooling``, ``loss``, or
    ``other``.

    Args:
        path: its name in the model, such as ``model.layers.0.self_attn.q_proj``.
        module: the module itself.
    """  # noqa: D205 (the list is the summary)
    for classes, role in _BY_CLASS:
        if isinstance(module, classes):
            return role
    parts = path.lower().split(".")
    # From the module's own name outwards: `mlp.norm` is a norm, `mlp.3` an mlp.
    for start in range(len(parts) - 1, -1, -1):
        tail = ".".join(parts[start:])
        for pattern, role in _COMPILED:
            if pattern.search(tail):
                return role
    own = type(module).__name__.lower()
    return next((role for pattern, role in _COMPILED if pattern.search(own)), "other")
