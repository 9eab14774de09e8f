"""What kind of work an operator does, told by its name: for the table by operator."""

from __future__ import annotations

import re

_KINDS: tuple[tuple[str, str], ...] = (
    (r"c10d|gloo:|nccl|all_?reduce|all_?gather|reduce_scatter|wait_tensor", "communication"),
    (r"^optimizer\.|_fused_adam|_fused_sgd|_foreach_", "optimizer"),
    (r"scaled_dot_product|flash_att|efficient_attention|fmha", "attention"),
    (r"conv", "convolution"),
    (r"lstm|gru|rnn", "rnn"),
    (r"softmax|cross_entropy|nll_loss", "softmax"),
    (r"norm|rsqrt", "norm"),
    (r"gemm|addmm|bmm|baddbmm|matmul|::mm$|::mv$|::dot$|linear|cutlass|cublas|einsum|addmv", "gemm"),
    (r"embedding|index|gather|scatter", "embedding"),
    (r"copy|clone|contiguous|memcpy|memset|::cat$|::stack$|fill_|zero_|repeat|_to$|::to$", "copy"),
    (r"::sum|::mean|reduce|::max$|::min$|::any|::all$|cumsum|::var|aminmax|argmax", "reduction"),
    (r"evaluate_function|backward\d*$|accumulategrad", "autograd"),
    (r"view|reshape|transpose|::t$|permute|expand|as_strided|slice|select|split|chunk|squeeze|unbind|detach|empty|alias"
     r"|resolve_|unflatten|flatten", "shape"),
    (r"add|mul|div|sub|exp|log|sigmoid|silu|gelu|relu|tanh|threshold|clamp|pow|sqrt|neg|where|mask|sin|cos|eq|ne|lt|gt"
     r"|le$|ge$|bitwise|dropout|bernoulli|random|normal|uniform|triton|elementwise|vectorized|addc|lerp|abs|sign|erf"
     r"|square|reciprocal|tril|triu|arange|ones|zeros|full|rand|not", "elementwise"),
)  # fmt: skip
_NODE = re.compile(r"^autograd::|\wBackward\d*$|AccumulateGrad$")
_COMPILED = tuple((re.compile(pattern), kind) for pattern, kind in _KINDS)


def kind_of(operator: str) -> str:
    """Return the kind of work: ``gemm``, ``attention``, ``softmax``, ``norm``, ``elementwise``, ``embedding``,
    ``reduction``, ``copy``, ``shape``, ``convolution``, ``rnn``, ``optimizer``, ``communication``, ``autograd`` or
    ``other``.

    Args:
        operator: name of an operator or kernel, such as ``aten::addmm``.
    """  # noqa: D205 (the list is the summary)
    if _NODE.search(operator):
        return "autograd"  # its own time, that is: what it calls are operators of their own
    name = operator.lower()
    if name.startswith("aten::"):
        name = re.sub(r"_backward(_data)?$", "", name)
    return next((kind for pattern, kind in _COMPILED if pattern.search(name)), "other")
