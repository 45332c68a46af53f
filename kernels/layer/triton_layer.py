"""What a layer computes between its matrix products, each as one Triton kernel forward and one backward.

    x' = x + keep branch            keep = (a random byte >= threshold) 256 / (256 - threshold), or 1
    h  = x' r w                     r = 1 / sqrt(mean(x'^2) + eps)
    g  = dx' + r (dh w - x' r^2 mean(dh w x'))      dx = g      dbranch = keep g      dw = sum of dh x' r

    q  = (y1 c - y2 s, y2 c + y1 s) of y = x r w, a head's two halves; c, s the cosine and sine of its position's angles
    dy = (dq1 c + dq2 s, dq2 c - dq1 s)             dx = r (dy w - x r^2 mean(dy w x))      dw = sum of dy x r

    out = silu(gate) up             dgate = dout up s (1 + gate (1 - s)), dup = dout gate s, s = sigmoid(gate)

    nats = lse - logits[target]     dlogits = dnats (exp(logits - lse) - [target]), lse = log sum exp(logits)

All of it is bound by memory: each kernel reads and writes every value once. A program owns ROWS rows (of the residual
stream, or of one head of one token) at a time. Backward it goes on to the rows `programs` tiles further and adds up dw
for each row of the tile: added up over the rows at every tile, through shared memory, the kernel takes six times as
long. A kernel of its own adds up what the programs end with, in a fixed order: twice the same input, twice the same
bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launched

# Rows of a tile, warps and, backward, programs. In microseconds on an H200, of 16384 x 384 in bf16, or as many heads of
# 64: add_norm 13 forward and 22 backward, whatever the tile; norm_rotary 20 and 28, swiglu of 16384 x 1024 27 and 42,
# at 3 to 4.1 TB/s.
ADD_NORM = {"ROWS": 4, "num_warps": 4}
ADD_NORM_BACKWARD = {"PART": 256, "ROWS": 2, "num_warps": 2, "programs": 1320}
NORM_ROTARY = {"ROWS": 64, "num_warps": 4}
NORM_ROTARY_BACKWARD = {"ROWS": 32, "num_warps": 4, "programs": 528}
SWIGLU = {"BLOCK": 2048, "num_warps": 8}
COLUMN_SUMS = {"BLOCK": 16, "ROWS": 256, "num_warps": 8}
CROSS_ENTROPY = {"SIZE": 4096, "num_warps": 4}  # elements of a tile: rows of a small vocabulary, or a part of one row


@triton.jit
def _mix(x):
    """A hash of 32 bits: each bit of x decides about half of its bits. (Wellons, "lowbias32", 2018)"""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(first, second, row, column, threshold):
    """Which entries dropout leaves: four neighbours get a byte each of a hash of their place and the key's halves."""
    row = _mix(_mix(row.to(tl.uint32) ^ first.to(tl.uint32)) + second.to(tl.uint32))
    word = _mix(row + (column >> 2).to(tl.uint32) * 0x9E3779B1)
    return ((word >> ((column & 3) * 8).to(tl.uint32)) & 255) >= threshold


@triton.jit
def add_norm_forward_kernel(x, branch, key, weight, new_x, h, rows, threshold, scale, eps, DROP: tl.constexpr,
                            WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    offs_r, offs_d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at = offs_r.to(tl.int64)[:, None] * WIDTH + offs_d[None, :]
    mask = (offs_r < rows)[:, None] & (offs_d < WIDTH)[None, :]
    add = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
    if DROP:
        kept = _kept(tl.load(key), tl.load(key + 1), offs_r[:, None], offs_d[None, :], threshold)
        add = tl.where(kept, add * scale, 0.0)
    new = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + add).to(new_x.dtype.element_ty)
    tl.store(new_x + at, new, mask=mask)
    new = new.to(tl.float32)
    r = tl.rsqrt(tl.sum(new * new, axis=1) / WIDTH + eps)[:, None]
    w = tl.load(weight + offs_d, mask=offs_d < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(h + at, (new * r * w).to(h.dtype.element_ty), mask=mask)


@triton.jit
def add_norm_backward_kernel(dnew_x, dh, new_x, key, weight, dx, dbranch, dw, rows, threshold, scale, eps,
                             DROP: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
                             ROWS: tl.constexpr):  # fmt: skip
    """dw (programs, WIDTH) fp32. Tiles are [PARTS, ROWS, PART]: up to 512 wide a warp has a row to itself."""
    offs_d = tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
    w = tl.load(weight + offs_d, mask=offs_d < WIDTH, other=0.0).to(tl.float32)
    dw_rows = tl.zeros([PARTS, ROWS, PART], tl.float32)
    if DROP:
        first, second = tl.load(key), tl.load(key + 1)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        offs_r = tile * ROWS + tl.arange(0, ROWS)[None, :, None]
        at = offs_r.to(tl.int64) * WIDTH + offs_d
        mask = (offs_r < rows) & (offs_d < WIDTH)
        x = tl.load(new_x + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dh + at, mask=mask, other=0.0).to(tl.float32)
        above = tl.load(dnew_x + at, mask=mask, other=0.0).to(tl.float32)
        r = tl.rsqrt(_row_sum(x * x) / WIDTH + eps)
        x *= r
        dw_rows += g * x
        g *= w
        g = r * (g - x * (_row_sum(g * x) / WIDTH)) + above
        tl.store(dx + at, g.to(dx.dtype.element_ty), mask=mask)
        if DROP:
            g = tl.where(_kept(first, second, offs_r, offs_d, threshold), g * scale, 0.0)
            tl.store(dbranch + at, g.to(dx.dtype.element_ty), mask=mask)
    to = dw + tl.program_id(0) * WIDTH + offs_d
    tl.store(to, tl.sum(dw_rows, axis=1, keep_dims=True), mask=offs_d < WIDTH)


@triton.jit
def column_sums_kernel(parts, sums, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    offs_r, offs_d = tl.arange(0, ROWS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        mask = (start + offs_r < rows)[:, None] & (offs_d < WIDTH)[None, :]
        total += tl.load(parts + (start + offs_r)[:, None] * WIDTH + offs_d[None, :], mask=mask, other=0.0)
    tl.store(sums + offs_d, tl.sum(total, axis=0), mask=offs_d < WIDTH)


@triton.jit
def _row_sum(x):
    return tl.sum(tl.sum(x, axis=2, keep_dims=True), axis=0, keep_dims=True)


@triton.jit
def _head_tile(tile, rows, heads, first, row_heads, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """A tile of `heads` heads of consecutive tokens: token and head [ROWS], offsets [ROWS, BLOCK] of the first halves
    among row_heads heads a token, of which `first` lie before, and which exist."""
    offs_r, offs_d = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    token, head = offs_r // heads, offs_r % heads
    at = (token.to(tl.int64) * row_heads + first + head)[:, None] * (2 * HALF) + offs_d[None, :]
    return token, head, at, (offs_r < rows)[:, None] & (offs_d < HALF)[None, :]


@triton.jit
def _load_halves(pointer, at, mask, HALF: tl.constexpr):
    return tl.load(pointer + at, mask=mask, other=0.0), tl.load(pointer + at + HALF, mask=mask, other=0.0)


@triton.jit
def _store_halves(pointer, at, first, second, mask, HALF: tl.constexpr):
    tl.store(pointer + at, first.to(pointer.dtype.element_ty), mask=mask)
    tl.store(pointer + at + HALF, second.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _scales(weight, HALF: tl.constexpr, BLOCK: tl.constexpr):
    offs_d = tl.arange(0, BLOCK)
    w1, w2 = _load_halves(weight, offs_d, offs_d < HALF, HALF)
    return w1.to(tl.float32)[None, :], w2.to(tl.float32)[None, :]


@triton.jit
def _angles(cos, sin, token, num_angles, mask, HALF: tl.constexpr, BLOCK: tl.constexpr):
    at = (token % num_angles)[:, None] * HALF + tl.arange(0, BLOCK)[None, :]
    return tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at, mask=mask, other=0.0)


@triton.jit
def norm_rotary_forward_kernel(qkv, q_norm, k_norm, cos, sin, q, k, v, tokens, num_angles, eps,
                               HQ: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
                               ROWS: tl.constexpr):  # fmt: skip
    """The second program id: queries, keys or values."""
    part = tl.program_id(1)
    heads = HQ if part == 0 else HK
    first = 0 if part == 0 else HQ + (part - 1) * HK
    token, _, at, mask = _head_tile(tl.program_id(0), tokens * heads, heads, first, HQ + 2 * HK, HALF, BLOCK, ROWS)
    _, _, to, _ = _head_tile(tl.program_id(0), tokens * heads, heads, 0, heads, HALF, BLOCK, ROWS)
    x1, x2 = _load_halves(qkv, at, mask, HALF)
    if part == 2:
        _store_halves(v, to, x1, x2, mask, HALF)
    else:
        w1, w2 = _scales(q_norm if part == 0 else k_norm, HALF, BLOCK)
        c, s = _angles(cos, sin, token, num_angles, mask, HALF, BLOCK)
        f1, f2 = x1.to(tl.float32), x2.to(tl.float32)
        r = tl.rsqrt(tl.sum(f1 * f1 + f2 * f2, axis=1) / (2 * HALF) + eps)[:, None]
        y1, y2 = f1 * r * w1, f2 * r * w2
        _store_halves(q if part == 0 else k, to, y1 * c - y2 * s, y2 * c + y1 * s, mask, HALF)


@triton.jit
def norm_rotary_backward_kernel(dq, dk, dv, qkv, q_norm, k_norm, cos, sin, dqkv, dw, tokens, seqlen, num_angles, eps,
                                q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
                                HQ: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
                                ROWS: tl.constexpr):  # fmt: skip
    """dw (programs, 2, 2 HALF) fp32, of the scales of queries and keys; strides in elements."""
    part = tl.program_id(1)
    heads = HQ if part == 0 else HK
    first = 0 if part == 0 else HQ + (part - 1) * HK
    dout = dq if part == 0 else (dk if part == 1 else dv)
    stride_b = q_batch if part == 0 else (k_batch if part == 1 else v_batch)
    stride_t = q_token if part == 0 else (k_token if part == 1 else v_token)
    stride_h = q_head if part == 0 else (k_head if part == 1 else v_head)
    w1, w2 = _scales(q_norm if part == 0 else k_norm, HALF, BLOCK)
    dw1, dw2 = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens * heads, ROWS), tl.num_programs(0)):
        token, head, at, mask = _head_tile(tile, tokens * heads, heads, first, HQ + 2 * HK, HALF, BLOCK, ROWS)
        row = (token // seqlen).to(tl.int64) * stride_b + (token % seqlen) * stride_t + head * stride_h
        g1, g2 = _load_halves(dout, row[:, None] + tl.arange(0, BLOCK)[None, :], mask, HALF)
        if part == 2:
            _store_halves(dqkv, at, g1, g2, mask, HALF)
        else:
            x1, x2 = _load_halves(qkv, at, mask, HALF)
            c, s = _angles(cos, sin, token, num_angles, mask, HALF, BLOCK)
            x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
            y1, y2 = g1.to(tl.float32) * c + g2.to(tl.float32) * s, g2.to(tl.float32) * c - g1.to(tl.float32) * s
            r = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF) + eps)[:, None]
            dw1 += y1 * x1 * r
            dw2 += y2 * x2 * r
            y1, y2 = y1 * w1, y2 * w2
            mean = (tl.sum(y1 * x1 + y2 * x2, axis=1) / (2 * HALF))[:, None] * r * r
            _store_halves(dqkv, at, r * (y1 - x1 * mean), r * (y2 - x2 * mean), mask, HALF)
    if part < 2:
        offs_d = tl.arange(0, BLOCK)
        to = dw + (tl.program_id(0) * 2 + part) * (2 * HALF) + offs_d
        _store_halves(to, 0, tl.sum(dw1, axis=0), tl.sum(dw2, axis=0), offs_d < HALF, HALF)


@triton.jit
def swiglu_forward_kernel(gate_up, out, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i // WIDTH < rows
    gate, up = _load_halves(gate_up, (i // WIDTH) * (2 * WIDTH) + i % WIDTH, mask, WIDTH)
    gate = gate.to(tl.float32)
    tl.store(out + i, (gate * tl.sigmoid(gate) * up.to(tl.float32)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(dout, gate_up, dgate_up, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i // WIDTH < rows
    at = (i // WIDTH) * (2 * WIDTH) + i % WIDTH
    gate, up = _load_halves(gate_up, at, mask, WIDTH)
    g = tl.load(dout + i, mask=mask, other=0.0).to(tl.float32)
    gate = gate.to(tl.float32)
    s = tl.sigmoid(gate)
    _store_halves(dgate_up, at, g * up.to(tl.float32) * s * (1 + gate * (1 - s)), g * gate * s, mask, WIDTH)


@triton.jit
def cross_entropy_forward_kernel(logits, targets, nats, lse, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                                 ROWS: tl.constexpr):  # fmt: skip
    offs_r, offs_d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    row = logits + offs_r.to(tl.int64) * WIDTH
    exists = offs_r < rows
    largest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        mask = exists[:, None] & (start + offs_d < WIDTH)[None, :]
        x = tl.load(row[:, None] + start + offs_d[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(x, axis=1))
        safe = tl.where(above > float("-inf"), above, 0.0)  # rows that do not exist
        total = total * tl.exp(largest - safe) + tl.sum(tl.exp(x - safe[:, None]), axis=1)
        largest = above
    sums = largest + tl.log(total)
    target = tl.load(targets + offs_r, mask=exists, other=0)
    tl.store(lse + offs_r, sums, mask=exists)
    known = exists & (target >= 0) & (target < WIDTH)
    tl.store(nats + offs_r, sums - tl.load(row + target, mask=known, other=float("nan")).to(tl.float32), mask=exists)


@triton.jit
def cross_entropy_backward_kernel(dnats, logits, targets, lse, dlogits, rows, WIDTH: tl.constexpr,
                                  BLOCK: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    offs_r, offs_d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = offs_r < rows
    at = offs_r.to(tl.int64)[:, None] * WIDTH + offs_d[None, :]
    mask = exists[:, None] & (offs_d < WIDTH)[None, :]
    x = tl.load(logits + at, mask=mask, other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(lse + offs_r, mask=exists, other=0.0)[:, None])
    target = tl.load(targets + offs_r, mask=exists, other=0)
    g = tl.load(dnats + offs_r, mask=exists, other=0.0)[:, None]
    dx = g * tl.where(offs_d[None, :] == target[:, None], p - 1.0, p)
    tl.store(dlogits + at, dx.to(dlogits.dtype.element_ty), mask=mask)


def _launch(kernel: Any, grid: tuple[int, ...], arguments: tuple, tile: dict[str, int], **constants: int) -> None:
    """constants are in the order of the kernel's last parameters, before the tile's."""
    tile = {name: value for name, value in tile.items() if name != "programs"}
    compiled = kernel[grid](*arguments, **constants, **tile)
    sizes = (value for name, value in tile.items() if name != "num_warps")
    launched(compiled, grid, (*arguments, *constants.values(), *sizes))


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def add_norm_forward(
    x: Tensor, branch: Tensor, key: Tensor | None, weight: Tensor, threshold: int, eps: float
) -> tuple[Tensor, Tensor]:
    new_x, h = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    arguments = (x, branch, key, weight, new_x, h, rows, threshold, 256 / (256 - threshold), eps)
    constants = {"DROP": key is not None, "WIDTH": width, "BLOCK": _power_of_2(width)}
    _launch(add_norm_forward_kernel, (-(-rows // ADD_NORM["ROWS"]),), arguments, ADD_NORM, **constants)
    return new_x, h


def add_norm_backward(
    dnew_x: Tensor, dh: Tensor, new_x: Tensor, key: Tensor | None, weight: Tensor, threshold: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dbranch (nothing where nothing is dropped: it is dx) and dw (width,) fp32."""
    dx, dbranch = torch.empty_like(new_x), torch.empty_like(new_x) if key is not None else new_x.new_empty(0)
    width, programs = new_x.shape[-1], ADD_NORM_BACKWARD["programs"]
    parts = new_x.new_empty((programs, width), dtype=torch.float32)
    arguments: tuple = (dnew_x, dh, new_x, key, weight, dx, dbranch, parts)
    arguments += (new_x.numel() // width, threshold, 256 / (256 - threshold), eps)
    constants = {"DROP": key is not None, "WIDTH": width}
    constants["PARTS"] = _power_of_2(-(-width // ADD_NORM_BACKWARD["PART"]))
    tile = {**ADD_NORM_BACKWARD, "num_warps": ADD_NORM_BACKWARD["ROWS"] * min(16, max(1, constants["PARTS"] // 2))}
    _launch(add_norm_backward_kernel, (programs,), arguments, tile, **constants)
    return dx, dbranch, _column_sums(parts, torch.empty_like(weight, dtype=torch.float32))


def _column_sums(parts: Tensor, sums: Tensor) -> Tensor:
    """sums, filled, of what the programs of a kernel have added up (programs, width); torch's take 12 us on an H200."""
    rows, width = parts.shape
    _launch(column_sums_kernel, (-(-width // COLUMN_SUMS["BLOCK"]),), (parts, sums, rows), COLUMN_SUMS, WIDTH=width)
    return sums


def norm_rotary_forward(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, seqlen, _ = qkv.shape
    tokens, head_dim = batch_size * seqlen, q_norm.shape[0]
    half = head_dim // 2
    q = qkv.new_empty((batch_size, seqlen, num_heads, head_dim))
    k = qkv.new_empty((batch_size, seqlen, num_kv_heads, head_dim))
    v = qkv.new_empty((batch_size, seqlen, num_kv_heads, head_dim))
    grid = (-(-tokens * num_heads // NORM_ROTARY["ROWS"]), 3)
    arguments = (qkv, q_norm, k_norm, cos, sin, q, k, v, tokens, cos.numel() // half, eps)
    constants = {"HQ": num_heads, "HK": num_kv_heads, "HALF": half, "BLOCK": _power_of_2(half)}
    _launch(norm_rotary_forward_kernel, grid, arguments, NORM_ROTARY, **constants)
    return q, k, v


def norm_rotary_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """dqkv, and both scales' gradients (2, head_dim) fp32."""
    batch_size, seqlen, num_heads, head_dim = dq.shape
    half, tile = head_dim // 2, NORM_ROTARY_BACKWARD
    dqkv = torch.empty_like(qkv)
    parts = qkv.new_empty((tile["programs"], 2 * head_dim), dtype=torch.float32)
    arguments: tuple = (dq, dk, dv, qkv, q_norm, k_norm, cos, sin, dqkv, parts)
    arguments += (batch_size * seqlen, seqlen, cos.numel() // half, eps)
    arguments += (*dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3])
    constants = {"HQ": num_heads, "HK": dk.shape[2], "HALF": half, "BLOCK": _power_of_2(half)}
    _launch(norm_rotary_backward_kernel, (tile["programs"], 3), arguments, tile, **constants)
    return dqkv, _column_sums(parts, parts.new_empty((2, head_dim)))


def swiglu_forward(gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    rows = gate_up.numel() // (2 * width)
    grid = (-(-rows * width // SWIGLU["BLOCK"]),)
    _launch(swiglu_forward_kernel, grid, (gate_up, out, rows), SWIGLU, WIDTH=width)
    return out


def swiglu_backward(dout: Tensor, gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    dgate_up = torch.empty_like(gate_up)
    rows = gate_up.numel() // (2 * width)
    grid = (-(-rows * width // SWIGLU["BLOCK"]),)
    _launch(swiglu_backward_kernel, grid, (dout, gate_up, dgate_up, rows), SWIGLU, WIDTH=width)
    return dgate_up


def _cross_entropy_tile(logits: Tensor) -> tuple[int, int, dict[str, int]]:
    width, size = logits.shape[-1], CROSS_ENTROPY["SIZE"]
    block = min(_power_of_2(width), size)
    tile = {"BLOCK": block, "ROWS": size // block, "num_warps": CROSS_ENTROPY["num_warps"]}
    return width, logits.numel() // width, tile


def cross_entropy_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of each target, and the logarithm of each row's sum of exponentials, fp32."""
    width, rows, tile = _cross_entropy_tile(logits)
    nats = targets.new_empty(targets.shape, dtype=torch.float32)
    lse = torch.empty_like(nats)
    grid = (-(-rows // tile["ROWS"]),)
    _launch(cross_entropy_forward_kernel, grid, (logits, targets, nats, lse, rows), tile, WIDTH=width)
    return nats, lse


def cross_entropy_backward(dnats: Tensor, logits: Tensor, targets: Tensor, lse: Tensor) -> Tensor:
    width, rows, tile = _cross_entropy_tile(logits)
    dlogits = torch.empty_like(logits)
    grid = (-(-rows // tile["ROWS"]), -(-width // tile["BLOCK"]))
    arguments = (dnats, logits, targets, lse, dlogits, rows)
    _launch(cross_entropy_backward_kernel, grid, arguments, tile, WIDTH=width)
    return dlogits
