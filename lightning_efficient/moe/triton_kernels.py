"""The kernels: the gate with its queues, rows into slots, and back with weights.

Everything is a gather: no two programs write to one place, no atomics, so results do not depend on the order of
programs. The gate reads the logits once and counts within a block of tokens; a scan over the blocks' counts, choices
outermost, then says where the queues of each block start.

Dimension letters: S tokens, M model size, E experts, k choices per token, N slots; C columns of all blocks' counts.
"""

import triton
import triton.language as tl


@triton.jit
def _softmax(x):
    """Of each row; masked entries hold -inf."""
    z = tl.exp(x - tl.max(x, axis=1)[:, None])
    return z / tl.sum(z, axis=1)[:, None]


@triton.jit
def _ordered(score, columns, LAST: tl.constexpr):
    """Integers in the order of the scores, and then of falling ids, so that a maximum has one place; NaN is greatest.

    The bits of a float, read as an integer, are in its order, those of negative ones reversed.
    """
    score = tl.where(score == 0, 0.0, score)  # -0 equals 0
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(score != score, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (bits.to(tl.int64) << 32) + (LAST - columns)[None, :]


@triton.jit(do_not_specialize=["S"])
def route_kernel(
    logits_ptr, bias_ptr, probs_ptr, chosen_ptr, expert_ptr, position_ptr, counts_ptr, S, E,
    BIAS: tl.constexpr, K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Probabilities, the chosen, and for each of a block's choices: places among the block's own, and counts."""
    block = tl.program_id(0)
    tokens = block * BLOCK_S + tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_E)
    inside = (tokens < S)[:, None] & (columns < E)[None, :]
    at = tokens.to(tl.int64)[:, None] * E + columns[None, :]
    logits = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    logits = tl.where(columns[None, :] < E, logits, float("-inf"))
    probs = _softmax(logits)
    tl.store(probs_ptr + at, probs, mask=inside)

    score = logits
    if BIAS:
        score = probs + tl.load(bias_ptr + columns, mask=columns < E, other=0.0).to(tl.float32)[None, :]
    taken = -(1 << 63)
    left = tl.where(columns[None, :] < E, _ordered(score, columns, BLOCK_E - 1), taken)
    for j in range(K):
        hit = left == tl.max(left, axis=1)[:, None]
        left = tl.where(hit, taken, left)
        counted = (hit & inside).to(tl.int32)
        place = tl.sum(tl.where(hit, tl.cumsum(counted, axis=0), 0), axis=1) - 1
        out = tokens.to(tl.int64) * K + j
        tl.store(chosen_ptr + out, tl.sum(tl.where(hit, probs, 0.0), axis=1), mask=tokens < S)
        tl.store(expert_ptr + out, tl.sum(tl.where(hit, columns[None, :], 0), axis=1).to(tl.int64), mask=tokens < S)
        tl.store(position_ptr + out, place.to(tl.int64), mask=tokens < S)
        row = j * tl.num_programs(0) + block
        tl.store(counts_ptr + row * E + columns, tl.sum(counted, axis=0), mask=columns < E)


@triton.jit(do_not_specialize=["C"])
def scan_kernel(counts_ptr, total_ptr, C, E, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr):
    """The counts, (C, E), become the sums of those above them; and the totals."""
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    above = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(0, C, BLOCK_C):
        rows = start + tl.arange(0, BLOCK_C)
        inside = (rows < C)[:, None] & (experts < E)[None, :]
        at = counts_ptr + rows[:, None] * E + experts[None, :]
        counts = tl.load(at, mask=inside, other=0)
        tl.store(at, above[None, :] + tl.cumsum(counts, axis=0) - counts, mask=inside)
        above += tl.sum(counts, axis=0)
    tl.store(total_ptr + experts, above.to(tl.int64), mask=experts < E)


@triton.jit(do_not_specialize=["A", "blocks"])
def place_kernel(
    position_ptr, expert_ptr, starts_ptr, A, E, blocks, K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_A: tl.constexpr
):
    """Places within a block become places in the queue."""
    at = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    inside = at < A
    row = (at % K) * blocks + at // K // BLOCK_S
    start = tl.load(starts_ptr + row * E + tl.load(expert_ptr + at, mask=inside, other=0), mask=inside, other=0)
    tl.store(position_ptr + at, tl.load(position_ptr + at, mask=inside, other=0) + start, mask=inside)


@triton.jit(do_not_specialize=["S"])
def route_gradient_kernel(
    probs_ptr, expert_ptr, g_probs_ptr, g_chosen_ptr, dlogits_ptr, S, E,
    PROBS: tl.constexpr, CHOSEN: tl.constexpr, K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Dlogits = p (g - sum(g p))."""
    tokens = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_E)
    inside = (tokens < S)[:, None] & (columns < E)[None, :]
    at = tokens.to(tl.int64)[:, None] * E + columns[None, :]
    probs = tl.load(probs_ptr + at, mask=inside, other=0.0)
    g = tl.zeros((BLOCK_S, BLOCK_E), dtype=tl.float32)
    if PROBS:
        g += tl.load(g_probs_ptr + at, mask=inside, other=0.0)
    if CHOSEN:
        for j in range(K):
            from_ = tokens.to(tl.int64) * K + j
            expert = tl.load(expert_ptr + from_, mask=tokens < S, other=0)
            g_chosen = tl.load(g_chosen_ptr + from_, mask=tokens < S, other=0.0)
            g += tl.where(columns[None, :] == expert[:, None], g_chosen[:, None], 0.0)
    tl.store(dlogits_ptr + at, probs * (g - tl.sum(g * probs, axis=1)[:, None]), mask=inside)


@triton.jit(do_not_specialize=["N"])
def gather_kernel(x_ptr, source_ptr, out_ptr, N, M, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row n of out is that of the token in slot n, or zeros."""
    slots = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    source = tl.load(source_ptr + slots, mask=slots < N, other=-1)
    width = (columns < M)[None, :]
    rows = tl.load(
        x_ptr + (source // K)[:, None] * M + columns[None, :], mask=(source >= 0)[:, None] & width, other=0.0
    )
    tl.store(out_ptr + slots.to(tl.int64)[:, None] * M + columns[None, :], rows, mask=(slots < N)[:, None] & width)


@triton.jit(do_not_specialize=["S", "N"])
def sum_kernel(
    h_ptr, slot_ptr, weight_ptr, y_ptr, S, N, M,
    WEIGHTED: tl.constexpr, K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Row s of y is the sum over j of row slot(s, j), times its weight."""
    tokens = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    width = (columns < M)[None, :]
    y = tl.zeros((BLOCK_S, BLOCK_M), dtype=tl.float32)
    for j in tl.static_range(K):
        at = tokens.to(tl.int64) * K + j
        slot = tl.load(slot_ptr + at, mask=tokens < S, other=-1)
        kept = (slot >= 0) & (slot < N)
        rows = tl.load(h_ptr + slot[:, None] * M + columns[None, :], mask=kept[:, None] & width, other=0.0)
        rows = rows.to(tl.float32)
        if WEIGHTED:
            # What was dropped adds 0 even where its weight is not finite.
            rows *= tl.load(weight_ptr + at, mask=kept, other=0.0).to(tl.float32)[:, None]
        y += rows
    tl.store(y_ptr + tokens.to(tl.int64)[:, None] * M + columns[None, :], y, mask=(tokens < S)[:, None] & width)


@triton.jit(do_not_specialize=["N"])
def unpermute_gradient_kernel(
    dy_ptr, h_ptr, weight_ptr, source_ptr, dh_ptr, dw_ptr, N, M,
    DH: tl.constexpr, DW: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Dh = w dy, and dw = dy h, by slot: a slot has at most one assignment, so that both are written once."""
    slots = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.load(source_ptr + slots, mask=slots < N, other=-1)
    filled = source >= 0
    weight = tl.load(weight_ptr + source, mask=filled, other=0.0).to(tl.float32)
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, M, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        width = (columns < M)[None, :]
        at = slots.to(tl.int64)[:, None] * M + columns[None, :]
        dy = tl.load(dy_ptr + (source // K)[:, None] * M + columns[None, :], mask=filled[:, None] & width, other=0.0)
        dy = dy.to(tl.float32)
        if DW:
            product += dy * tl.load(h_ptr + at, mask=filled[:, None] & width, other=0.0).to(tl.float32)
        if DH:
            tl.store(dh_ptr + at, dy * weight[:, None], mask=(slots < N)[:, None] & width)
    if DW:
        tl.store(dw_ptr + source, tl.sum(product, axis=1), mask=filled)
