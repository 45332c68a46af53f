"""decode_step against its definition in fp64: sizes that break tiles, both dtypes, unequal positions, batches."""

import pytest
import torch

import kernels
from kernels.decode_step import reference

# num_layers, model_dim, num_heads, num_kv_heads, head_dim, mlp_dim, vocab_size, capacity
SHAPES = [
    (2, 32, 4, 2, 8, 48, 300, 24),
    (1, 40, 6, 3, 20, 52, 301, 33),
    (3, 128, 4, 4, 32, 256, 375, 130),
    (2, 96, 3, 1, 64, 113, 257, 300),
    (1, 160, 2, 1, 128, 96, 120, 150),
    (1, 768, 12, 12, 64, 512, 300, 600),  # wider than Hopper's own kernels, and more keys than wait in registers
    (2, 128, 2, 1, 64, 192, 300, 300),  # this and the following ones: for Hopper's own kernels
    (1, 256, 4, 2, 64, 128, 130, 90),
    (2, 384, 6, 6, 64, 1024, 256, 700),
]
EPS = 1e-6


def arguments(shape: tuple[int, ...], batch: int, dtype: torch.dtype, device: str):
    """token_ids, positions, k_cache, v_cache, weights; what lies behind a position is NaN."""
    num_layers, model_dim, num_heads, num_kv_heads, head_dim, mlp_dim, vocab_size, capacity = shape
    generator = torch.Generator().manual_seed(batch)

    def matrix(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) / size[-1] ** 0.5).to(device, dtype)

    def scale(*size: int) -> torch.Tensor:
        return (1.0 + 0.1 * torch.randn(size, generator=generator)).to(device, dtype)

    angles = torch.outer(torch.arange(capacity).float(), 10_000 ** -(torch.arange(0, head_dim, 2) / head_dim))
    weights = kernels.DecodeWeights(
        embedding=torch.randn((vocab_size, model_dim), generator=generator).to(device, dtype),
        input_norm=scale(num_layers, model_dim),
        qkv=matrix(num_layers, (num_heads + 2 * num_kv_heads) * head_dim, model_dim),
        q_norm=scale(num_layers, head_dim),
        k_norm=scale(num_layers, head_dim),
        o=matrix(num_layers, model_dim, num_heads * head_dim),
        post_norm=scale(num_layers, model_dim),
        gate_up=matrix(num_layers, 2 * mlp_dim, model_dim),
        down=matrix(num_layers, model_dim, mlp_dim),
        final_norm=scale(model_dim),
        cos=angles.cos().to(device),
        sin=angles.sin().to(device),
    )
    token_ids = torch.randint(vocab_size, (batch,), generator=generator).to(device)
    positions = torch.randint(capacity, (batch,), generator=generator, dtype=torch.int32)
    positions[0] = capacity - 1
    positions[-1] = 0 if batch > 1 else positions[-1]
    caches = torch.randn((2, num_layers, batch, num_kv_heads, capacity, head_dim), generator=generator)
    unwritten = torch.arange(capacity) >= positions[:, None]  # (batch, capacity)
    caches.masked_fill_(unwritten[None, None, :, None, :, None], float("nan"))
    k_cache, v_cache = caches.to(device, dtype)
    return token_ids, positions.to(device), k_cache, v_cache, weights


def by_definition(token_ids, positions, k_cache, v_cache, weights, dtype: torch.dtype):
    """Computed in `dtype`: logits and caches."""
    caches = [cache.to(dtype, copy=True) for cache in (k_cache, v_cache)]
    given = (weight if weight is None else weight.to(dtype) for weight in weights)
    logits = reference.decode_step(token_ids, positions, *caches, *given, EPS)
    return logits.double(), *(cache.double() for cache in caches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 4, 9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(device: str, shape: tuple[int, ...], batch: int, dtype: torch.dtype):
    check_against_the_definition(arguments(shape, batch, dtype, device), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 9])
def test_int8_weights_equal_the_definition(device: str, batch: int, dtype: torch.dtype):
    *tensors, weights = arguments(SHAPES[2], batch, dtype, device)
    check_against_the_definition((*tensors, weights.to_int8()), dtype)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 7, 16])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[3], (1, 48, 3, 3, 16, 80, 48, 40)], ids=str)
def test_packed_weights_equal_the_definition(shape: tuple[int, ...], batch: int, dtype: torch.dtype, int8: bool):
    *tensors, weights = arguments(shape, batch, dtype, "cpu")
    weights = weights.to_int8() if int8 else weights
    check_against_the_definition((*tensors, weights), dtype, weights.packed())


def test_packing_moves_rows_side_by_side():
    kernels.load("cpu")
    weights = arguments(SHAPES[2], 1, torch.bfloat16, "cpu")[-1].to_int8()
    packed = weights.packed()
    assert packed.down.dim() == 5 and weights.packed().down.dtype == torch.int8
    lanes = packed.down.shape[-2]
    for name in ("qkv", "o", "down"):
        rows = getattr(packed, name).transpose(-3, -2).flatten(-5 + 1, -3).flatten(-2)
        assert torch.equal(rows, getattr(weights, name))
    gate, up = weights.gate_up.chunk(2, dim=1)
    blocks = packed.gate_up.transpose(-3, -2).flatten(-2).unflatten(1, (-1, 2))  # (num_layers, blocks, 2, lanes, size)
    assert torch.equal(blocks[:, :, 0].flatten(1, 2), gate) and torch.equal(blocks[:, :, 1].flatten(1, 2), up)
    assert torch.equal(packed.gate_up_scale[:, lanes : 2 * lanes], weights.gate_up_scale[:, 256 : 256 + lanes])
    odd = arguments(SHAPES[3], 1, torch.bfloat16, "cpu")[-1]  # 113 hidden units
    assert odd.packed().gate_up is odd.gate_up


def test_int8_weights_are_the_nearest():
    weights = arguments(SHAPES[1], 1, torch.float32, "cpu")[-1]
    rounded = weights.to_int8()
    for name in ("qkv", "o", "gate_up", "down"):
        scale = getattr(rounded, f"{name}_scale")[..., None]
        error = (getattr(rounded, name) * scale - getattr(weights, name)).abs()
        assert getattr(rounded, name).dtype == torch.int8 and (error <= 0.501 * scale).all()
        assert (getattr(rounded, name).abs().amax(dim=-1) == 127).all()


def check_against_the_definition(given, dtype: torch.dtype, packed: kernels.DecodeWeights | None = None) -> None:
    batch, vocab_size = len(given[0]), len(given[-1].embedding)
    exact = by_definition(*given, torch.float64)
    plain = by_definition(*given, dtype)
    logits = kernels.decode_step(*given[:-1], packed or given[-1], norm_eps=EPS)
    assert logits.shape == (batch, vocab_size) and logits.dtype == torch.float32
    got = (logits.double(), given[2].double(), given[3].double())
    for ours, theirs, truth in zip(got, plain, exact, strict=True):
        written = ~truth.isnan()
        assert torch.equal(ours.isnan(), ~written)  # nothing but the new keys and values was written
        ours, theirs, truth = ours[written], theirs[written], truth[written]
        rounding = torch.finfo(dtype).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + rounding


BATCHES = [  # more than any tile holds, and on Hopper than its kernels for few sequences take
    (SHAPES[2], (17,)),
    (SHAPES[5], (17,)),
    (SHAPES[6], (9, 70)),
    (SHAPES[-1], (24,)),
    ((1, 384, 6, 6, 64, 128, 130, 300), (3, 17, 30, 60, 100)),
]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "batch_sizes"), BATCHES, ids=str)
def test_a_sequence_does_not_depend_on_its_batch(
    device: str, shape: tuple[int, ...], batch_sizes: tuple[int, ...], dtype: torch.dtype, int8: bool
):
    *tensors, weights = arguments(shape, batch_sizes[-1], dtype, device)
    check_independence((*tensors, weights.to_int8() if int8 else weights), batch_sizes)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "batch_sizes"), BATCHES, ids=str)
def test_nor_does_it_with_packed_weights(
    shape: tuple[int, ...], batch_sizes: tuple[int, ...], dtype: torch.dtype, int8: bool
):
    *tensors, weights = arguments(shape, batch_sizes[-1], dtype, "cpu")
    check_independence((*tensors, (weights.to_int8() if int8 else weights).packed()), batch_sizes)


def check_independence(given, batch_sizes: tuple[int, ...]) -> None:
    token_ids, positions, k_cache, v_cache, weights = given

    def step(rows: slice) -> torch.Tensor:
        caches = [cache[:, rows].contiguous() for cache in (k_cache, v_cache)]
        return kernels.decode_step(token_ids[rows], positions[rows], *caches, weights, norm_eps=EPS)

    alone = torch.cat([step(slice(row, row + 1)) for row in range(batch_sizes[-1])])
    for batch_size in batch_sizes:
        assert torch.equal(step(slice(batch_size)), alone[:batch_size])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=str)
def test_a_prompt_is_read_as_token_by_token(shape: tuple[int, ...], dtype: torch.dtype, packed: bool):
    *_, k_cache, _, weights = arguments(shape, 2, dtype, "cpu")
    seqlen, vocab_size = 21, shape[6]
    token_ids = torch.randint(vocab_size, (2, seqlen))
    positions = torch.arange(seqlen, dtype=torch.int32).expand(2, seqlen).contiguous()
    k_cache.fill_(float("nan"))
    given = (token_ids, positions, k_cache, k_cache.clone(), weights)
    check_against_the_definition(given, dtype, weights.packed() if packed else weights)
    alone = [cache.clone().fill_(float("nan")) for cache in (k_cache, k_cache)]
    weights = weights.packed() if packed else weights
    for tokens, at in zip(token_ids.T, positions.T, strict=True):
        logits = kernels.decode_step(tokens.contiguous(), at.contiguous(), *alone, weights, norm_eps=EPS)
    together = [cache.clone().fill_(float("nan")) for cache in (k_cache, k_cache)]
    assert torch.equal(kernels.decode_step(token_ids, positions, *together, weights, norm_eps=EPS), logits)
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_opcheck():
    token_ids, positions, k_cache, v_cache, weights = arguments(SHAPES[0], 2, torch.float32, "cpu")
    kernels.load("cpu")
    everything = (token_ids, positions, k_cache.nan_to_num(), v_cache.nan_to_num(), *weights, EPS)
    torch.library.opcheck(torch.ops.kernels.decode_step.default, everything)


@pytest.mark.gpu
def test_graph_replay_equals_eager():
    token_ids, positions, k_cache, v_cache, weights = arguments(SHAPES[2], 4, torch.bfloat16, "cuda")
    caches = k_cache.nan_to_num(), v_cache.nan_to_num()
    kernels.decode_step(token_ids, positions, *caches, weights, norm_eps=EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = kernels.decode_step(token_ids, positions, *caches, weights, norm_eps=EPS)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        token_ids.copy_(torch.randint(375, (4,), generator=generator))
        positions.copy_(torch.randint(130, (4,), generator=generator))
        graph.replay()
        assert torch.equal(logits, kernels.decode_step(token_ids, positions, *caches, weights, norm_eps=EPS))


def test_bad_arguments_are_named():
    token_ids, positions, k_cache, v_cache, weights = arguments(SHAPES[0], 2, torch.float32, "cpu")
    int8 = weights.to_int8()
    bad = {
        "token_ids": (token_ids.int(), positions, k_cache, v_cache, weights),
        "positions": (token_ids, positions[:1], k_cache, v_cache, weights),
        "v_cache": (token_ids, positions, k_cache, v_cache.transpose(0, 1).contiguous().transpose(0, 1), weights),
        "k_cache": (token_ids, positions, k_cache[0], v_cache, weights),
        "qkv": (token_ids, positions, k_cache, v_cache, weights._replace(qkv=weights.qkv[:, 1:].contiguous())),
        "down": (token_ids, positions, k_cache, v_cache, weights._replace(down=weights.down.double())),
        "o": (token_ids, positions, k_cache, v_cache, int8._replace(o_scale=None)),
        "down_scale": (token_ids, positions, k_cache, v_cache, int8._replace(down_scale=int8.gate_up_scale)),
        "embedding": (
            token_ids,
            positions,
            k_cache,
            v_cache,
            weights._replace(embedding=weights.embedding[None, None]),
        ),
        "weights": (token_ids, positions, k_cache, v_cache, weights._replace(embedding=weights.embedding.half())),
    }
    for name, given in bad.items():
        with pytest.raises(ValueError, match=f"^{name}: got"):
            kernels.decode_step(*given, norm_eps=EPS)


def test_no_token_counts_as_the_first(device: str):
    """What the sampler gives where it cannot draw."""
    token_ids, *rest = arguments(SHAPES[0], 3, torch.float32, device)
    token_ids[1] = -1
    expected = kernels.decode_step(token_ids.clamp(min=0), *rest, norm_eps=EPS)
    assert torch.equal(kernels.decode_step(token_ids, *rest, norm_eps=EPS), expected)
    assert torch.equal(kernels.decode_step(token_ids, *rest, norm_eps=EPS, check=False), expected)


@pytest.mark.parametrize(
    ("name", "value"), [("positions", 24), ("positions", -1), ("token_ids", 300), ("token_ids", -2)]
)
def test_values_out_of_range_are_named_on_the_cpu(name: str, value: int):
    token_ids, positions, k_cache, v_cache, weights = arguments(SHAPES[0], 2, torch.float32, "cpu")
    {"token_ids": token_ids, "positions": positions}[name][1] = value
    with pytest.raises((RuntimeError, IndexError)):
        kernels.decode_step(token_ids, positions, k_cache, v_cache, weights, norm_eps=EPS)
