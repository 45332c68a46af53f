"""One step of a decoder on the GPU: four kernels a layer, so that little stands between two reads of weights.

    embed       x = embedding[token]
    qkv         a head a program: its rows of W_qkv times norm(x); q and k normalised and rotated; k, v into the cache
    attend      a (sequence, head) a program: softmax over the cache, then the head's columns of W_o: a part of the sum
    gate_up     a tile of hidden units a program: x + the heads' parts, norm, both products, silu(gate) * up
    down        a tile of x a program: x + the heads' parts + W_down hidden
    head        a tile of the vocabulary a program: logits = embedding norm(x)

The norm needs no kernel of its own: norm(x) W = (x scale) W / rms(x), and the squares are summed beside the product.
The heads' parts are added by whoever reads them, always in the order of the heads, so that nothing is added atomically.

A product has BLOCK_B = 16 sequences as rows (the least that the matrix units take), whatever the batch: a sequence's
logits do not depend on its neighbours. x, the parts and all sums are fp32; what enters a matrix unit is rounded to the
weights' dtype.

Where the card has programmatic launches (sm_90), a kernel starts while the one before ends, and waits for its results.

Knows torch and Triton; knows nothing of models beyond the layer that it computes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_B = 16


@triton.jit
def _begin(OVERLAP: tl.constexpr):
    """Let the next kernel start, and wait until what the one before wrote can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _stream(x_ptr, parts_ptr, rows, columns, mask, batch, dim: tl.constexpr, num_parts: tl.constexpr):
    """x [rows, columns] fp32, with the parts of the attention's output added that were not added yet."""
    at = rows[:, None] * dim + columns[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    for part in range(num_parts):
        x += tl.load(parts_ptr + part * batch * dim + at, mask=mask, other=0.0)
    return x


@triton.jit
def _product(x, w):
    """x [rows, BLOCK_K] times the transpose of w [columns, BLOCK_K]: fp32, in the matrix units where w is not fp32.

    In fp32 the products of a tile are added up in a tree, which rounds less than a chain does. (As `tl.dot` they would
    be a chain, and the compiler would hang each tile's chain onto the one before: model_dim additions in a row.)
    """
    return tl.sum(x[:, None, :] * w[None, :, :], axis=2) if w.dtype == tl.float32 else tl.dot(x, tl.trans(w))


@triton.jit
def _rotated(first, second, squares, scale_ptr, cos, sin, eps, offs, inside, HEAD_DIM: tl.constexpr):
    """Both halves of a head's rows [BLOCK_B, HALF]: normalised, scaled, turned by their angles."""
    factor = (1.0 / tl.sqrt_rn(squares / HEAD_DIM + eps))[:, None]
    first = first * factor * tl.load(scale_ptr + offs, mask=inside, other=0.0).to(tl.float32)[None, :]
    second = second * factor * tl.load(scale_ptr + HEAD_DIM // 2 + offs, mask=inside, other=0.0).to(tl.float32)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _embed(token_ptr, embedding_ptr, x_ptr, dim: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    _begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    token = tl.load(token_ptr + row)
    x = tl.load(embedding_ptr + token * dim + columns, mask=columns < dim, other=0.0)
    tl.store(x_ptr + row * dim + columns, x.to(tl.float32), mask=columns < dim)


@triton.jit
def _qkv(
    x_ptr,
    w_ptr,  # [(num_heads + 2 num_kv_heads) * HEAD_DIM, dim]
    norm_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    q_ptr,  # [batch, num_heads, HEAD_DIM] fp32
    k_cache_ptr,  # [batch, num_kv_heads, capacity, HEAD_DIM]
    v_cache_ptr,
    batch,
    capacity,
    eps,
    dim: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # HEAD_DIM / 2, rounded up to what a product takes
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    _begin(OVERLAP)
    head = tl.program_id(0)
    rows = tl.program_id(1) * 16 + tl.arange(0, 16)  # sequences
    offs = tl.arange(0, HALF)
    inside, in_batch = offs < HEAD_DIM // 2, rows < batch
    first = tl.zeros([16, HALF], tl.float32)
    second = tl.zeros([16, HALF], tl.float32)
    squares = tl.zeros([16], tl.float32)
    for start in range(0, dim, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + rows[:, None] * dim + columns[None, :],
            mask=in_batch[:, None] & (columns < dim)[None, :],
            other=0.0,
        )
        squares += tl.sum(x * x, axis=1)
        scale = tl.load(norm_ptr + columns, mask=columns < dim, other=0.0)
        scaled = (x * scale.to(tl.float32)[None, :]).to(w_ptr.dtype.element_ty)
        w_at = w_ptr + (head * HEAD_DIM + offs)[:, None] * dim + columns[None, :]  # [HALF, BLOCK_K]
        w_mask = inside[:, None] & (columns < dim)[None, :]
        first += _product(scaled, tl.load(w_at, mask=w_mask, other=0.0))
        w_at += HEAD_DIM // 2 * dim
        second += _product(scaled, tl.load(w_at, mask=w_mask, other=0.0))
    factor = (1.0 / tl.sqrt_rn(squares / dim + eps))[:, None]
    first, second = first * factor, second * factor

    position = tl.load(position_ptr + rows, mask=in_batch, other=0)
    mask = in_batch[:, None] & inside[None, :]
    angle = position[:, None] * (HEAD_DIM // 2) + offs[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    if head < num_heads:
        first, second = _rotated(first, second, squares, q_norm_ptr, cos, sin, eps, offs, inside, HEAD_DIM)
        q_at = q_ptr + (rows[:, None] * num_heads + head) * HEAD_DIM + offs[None, :]
        tl.store(q_at, first, mask=mask)
        tl.store(q_at + HEAD_DIM // 2, second, mask=mask)
    else:
        cache_ptr = v_cache_ptr
        kv_head = head - num_heads - num_kv_heads
        if head < num_heads + num_kv_heads:
            first, second = _rotated(first, second, squares, k_norm_ptr, cos, sin, eps, offs, inside, HEAD_DIM)
            cache_ptr = k_cache_ptr
            kv_head = head - num_heads
        line = (rows.to(tl.int64) * num_kv_heads + kv_head) * capacity + position
        at = cache_ptr + line[:, None] * HEAD_DIM + offs[None, :]
        tl.store(at, first.to(cache_ptr.dtype.element_ty), mask=mask)
        tl.store(at + HEAD_DIM // 2, second.to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    position_ptr,
    w_ptr,  # [dim, num_heads * HEAD_DIM]
    parts_ptr,  # [num_heads, batch, dim] fp32
    batch,
    capacity,
    scale,  # log2(e) / sqrt(HEAD_DIM)
    dim: tl.constexpr,
    num_heads: tl.constexpr,
    groups: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM, rounded up to a power of two
    BLOCK_T: tl.constexpr,  # keys
    BLOCK_N: tl.constexpr,  # rows of W_o
    OVERLAP: tl.constexpr,
):
    _begin(OVERLAP)
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_d < HEAD_DIM
    q = tl.load(q_ptr + (sequence * num_heads + head) * HEAD_DIM + offs_d, mask=inside, other=0.0) * scale
    seqlen = tl.load(position_ptr + sequence) + 1
    line = (sequence * (num_heads // groups) + head // groups) * capacity
    row_max = float("-inf")
    row_sum = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, seqlen, BLOCK_T):
        keys = start + tl.arange(0, BLOCK_T)
        at = (line + keys)[:, None] * HEAD_DIM + offs_d[None, :]
        mask = (keys < seqlen)[:, None] & inside[None, :]
        k = tl.load(k_cache_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_cache_ptr + at, mask=mask, other=0.0).to(tl.float32)
        s = tl.where(keys < seqlen, tl.sum(k * q[None, :], axis=1), float("-inf"))  # [BLOCK_T], in powers of two
        new_max = tl.maximum(row_max, tl.max(s, axis=0))
        alpha = tl.exp2(row_max - new_max)
        p = tl.exp2(s - new_max)
        row_sum = row_sum * alpha + tl.sum(p, axis=0)
        acc = acc * alpha + tl.sum(p[:, None] * v, axis=0)
        row_max = new_max
    out = acc / row_sum
    for start in range(0, dim, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        w_at = w_ptr + n[:, None] * (num_heads * HEAD_DIM) + head * HEAD_DIM + offs_d[None, :]
        w = tl.load(w_at, mask=(n < dim)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        part = tl.sum(w * out[None, :], axis=1)
        tl.store(parts_ptr + (head * batch + sequence) * dim + n, part, mask=n < dim)


@triton.jit
def _gate_up(
    x_ptr,
    parts_ptr,
    w_ptr,  # [2 mlp_dim, dim]
    norm_ptr,
    hidden_ptr,  # [batch, mlp_dim] in the weights' dtype
    batch,
    eps,
    dim: tl.constexpr,
    mlp_dim: tl.constexpr,
    num_parts: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    _begin(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * 16 + tl.arange(0, 16)
    gate = tl.zeros([16, BLOCK_N], tl.float32)
    up = tl.zeros([16, BLOCK_N], tl.float32)
    squares = tl.zeros([16], tl.float32)
    for start in range(0, dim, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        mask = (rows < batch)[:, None] & (columns < dim)[None, :]
        x = _stream(x_ptr, parts_ptr, rows, columns, mask, batch, dim, num_parts)
        squares += tl.sum(x * x, axis=1)
        scale = tl.load(norm_ptr + columns, mask=columns < dim, other=0.0)
        scaled = (x * scale.to(tl.float32)[None, :]).to(w_ptr.dtype.element_ty)
        w_at = w_ptr + n[:, None] * dim + columns[None, :]  # [BLOCK_N, BLOCK_K]
        w_mask = (n < mlp_dim)[:, None] & (columns < dim)[None, :]
        gate += _product(scaled, tl.load(w_at, mask=w_mask, other=0.0))
        w_at += mlp_dim * dim
        up += _product(scaled, tl.load(w_at, mask=w_mask, other=0.0))
    factor = (1.0 / tl.sqrt_rn(squares / dim + eps))[:, None]
    gate, up = gate * factor, up * factor
    hidden = gate * tl.sigmoid(gate) * up
    at = hidden_ptr + rows[:, None] * mlp_dim + n[None, :]
    tl.store(at, hidden.to(hidden_ptr.dtype.element_ty), mask=(rows < batch)[:, None] & (n < mlp_dim)[None, :])


@triton.jit
def _down(
    x_ptr,
    parts_ptr,
    hidden_ptr,
    w_ptr,  # [dim, mlp_dim]
    batch,
    dim: tl.constexpr,
    mlp_dim: tl.constexpr,
    num_parts: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    _begin(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * 16 + tl.arange(0, 16)
    mask = (rows < batch)[:, None] & (n < dim)[None, :]
    acc = _stream(x_ptr, parts_ptr, rows, n, mask, batch, dim, num_parts)
    for start in range(0, mlp_dim, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        hidden = tl.load(
            hidden_ptr + rows[:, None] * mlp_dim + columns[None, :],
            mask=(rows < batch)[:, None] & (columns < mlp_dim)[None, :],
            other=0.0,
        )
        w_at = w_ptr + n[:, None] * mlp_dim + columns[None, :]  # [BLOCK_N, BLOCK_K]
        w = tl.load(w_at, mask=(n < dim)[:, None] & (columns < mlp_dim)[None, :], other=0.0)
        acc += _product(hidden, w)
    tl.store(x_ptr + rows[:, None] * dim + n[None, :], acc, mask=mask)


@triton.jit
def _head(
    x_ptr,
    w_ptr,  # [vocab_size, dim]
    norm_ptr,
    logits_ptr,  # [batch, vocab_size] fp32
    batch,
    vocab_size,
    eps,
    dim: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    _begin(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * 16 + tl.arange(0, 16)
    acc = tl.zeros([16, BLOCK_N], tl.float32)
    squares = tl.zeros([16], tl.float32)
    for start in range(0, dim, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + rows[:, None] * dim + columns[None, :],
            mask=(rows < batch)[:, None] & (columns < dim)[None, :],
            other=0.0,
        )
        squares += tl.sum(x * x, axis=1)
        scale = tl.load(norm_ptr + columns, mask=columns < dim, other=0.0)
        scaled = (x * scale.to(tl.float32)[None, :]).to(w_ptr.dtype.element_ty)
        w_at = w_ptr + n[:, None].to(tl.int64) * dim + columns[None, :]
        w = tl.load(w_at, mask=(n < vocab_size)[:, None] & (columns < dim)[None, :], other=0.0)
        acc += _product(scaled, w)
    acc *= (1.0 / tl.sqrt_rn(squares / dim + eps))[:, None]
    at = logits_ptr + rows[:, None].to(tl.int64) * vocab_size + n[None, :]
    tl.store(at, acc, mask=(rows < batch)[:, None] & (n < vocab_size)[None, :])


def decode_step(
    token_ids: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    embedding: Tensor,
    input_norm: Tensor,
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    o: Tensor,
    post_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    final_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_eps: float,
) -> Tensor:
    """See `kernels.decode_step`."""
    num_layers, batch, num_kv_heads, capacity, head_dim = k_cache.shape
    vocab_size, dim = embedding.shape
    mlp_dim, num_heads = down.shape[2], o.shape[2] // head_dim
    x = embedding.new_empty((batch, dim), dtype=torch.float32)
    q = embedding.new_empty((batch, num_heads, head_dim), dtype=torch.float32)
    parts = embedding.new_empty((num_heads, batch, dim), dtype=torch.float32)
    hidden = embedding.new_empty((batch, mlp_dim))
    logits = embedding.new_empty((batch, vocab_size), dtype=torch.float32)

    overlap = _can_overlap(embedding.device)
    shared = {"OVERLAP": overlap, "num_warps": 4, **({"launch_pdl": True} if overlap else {})}
    block_k = min(32 if embedding.dtype == torch.float32 else 128, max(16, triton.next_power_of_2(dim)))
    batches = triton.cdiv(batch, BLOCK_B)
    product = {"BLOCK_K": block_k, "num_stages": 4, **shared}
    _embed[(batch,)](token_ids, embedding, x, dim, triton.next_power_of_2(dim), **shared)
    for layer in range(num_layers):
        caches = k_cache[layer], v_cache[layer]
        _qkv[(num_heads + 2 * num_kv_heads, batches)](
            x, qkv[layer], input_norm[layer], q_norm[layer], k_norm[layer], cos, sin, positions, q, *caches,
            batch, capacity, norm_eps, dim, num_heads, num_kv_heads,
            HEAD_DIM=head_dim, HALF=max(16, triton.next_power_of_2(head_dim // 2)), **product,
        )  # fmt: skip
        _attend[(batch, num_heads)](
            q, *caches, positions, o[layer], parts, batch, capacity, 1.4426950408889634 / head_dim**0.5,
            dim, num_heads, num_heads // num_kv_heads,
            HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_T=64, BLOCK_N=64, **shared,
        )  # fmt: skip
        _gate_up[(triton.cdiv(mlp_dim, 16), batches)](
            x, parts, gate_up[layer], post_norm[layer], hidden, batch, norm_eps, dim, mlp_dim, num_heads,
            BLOCK_N=16, **product,
        )  # fmt: skip
        _down[(triton.cdiv(dim, 16), batches)](
            x, parts, hidden, down[layer], batch, dim, mlp_dim, num_heads, BLOCK_N=16, **product
        )
    block_n = 16 if vocab_size <= 4096 else 64
    _head[(triton.cdiv(vocab_size, block_n), batches)](
        x, embedding, final_norm, logits, batch, vocab_size, norm_eps, dim, BLOCK_N=block_n, **product
    )
    return logits


def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
