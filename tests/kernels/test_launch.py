"""Launches replayed from C++: a launcher is understood or left alone, and a replay does what the launcher did."""

import sys
import types

import pytest
import torch

import kernels
from kernels.load import BuildError

load = sys.modules["kernels.load"]


@pytest.fixture(scope="module")
def launch():
    """kernels.launch, with what it needs compiled and loaded."""
    pytest.importorskip("triton")
    try:
        for library in load.build_launch():
            torch.ops.load_library(library)
    except BuildError as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise
    from kernels import launch

    return launch


def compiled(*signature: str) -> types.SimpleNamespace:
    """What Triton's `kernel[grid](...)` would return."""
    metadata = types.SimpleNamespace(
        num_ctas=1, launch_cooperative_grid=False, global_scratch_size=0, profile_scratch_size=0, num_warps=4,
        shared=1024, launch_pdl=False, tensordesc_meta=None,
    )  # fmt: skip
    source = types.SimpleNamespace(signature=dict(part.split() for part in signature))
    return types.SimpleNamespace(function=7, metadata=metadata, src=source)


def watch(launch, launcher, *arguments):
    """The Watch of a launcher whose launches Triton counts as they are reported."""

    def counted(*arguments):
        result = launcher(*arguments)
        watched.num_launches = len(watched.launches)
        return result

    watched = launch.Watch(arguments, {"seed": 3})
    watched.run(counted)
    return watched


def test_a_launcher_is_understood(launch):
    def launcher(x, y, scale, seed):
        out, zeros = torch.empty_like(x), torch.zeros(3, dtype=torch.int32)
        kernel = compiled("x *fp32", "y *fp32", "z *i32", "scale fp32", "n i32", "BLOCK constexpr", "seed i32")
        launch.launched(kernel, (5, 2), (x, out[1], zeros, scale, 64, 128, seed))
        return out

    watched = watch(launch, launcher, torch.ones(2, 4), torch.ones(2, 4), 1.5, 9)
    one_and_a_half = 0x3FC00000
    parameters = [1, 0, 0, 1, 4, 16, 1, 5, 0, 0, one_and_a_half, 0, 64, 3, 3]
    assert watched.understood and watched.zeroed == [1]
    assert watched.launches == [[7, 5, 2, 1, 128, 1024, 0, 6, *parameters]]


REASONS = ("a copy", "memory from elsewhere", "a value that is read", "shared memory", "a changed seed")


@pytest.mark.parametrize("reason", REASONS)
def test_a_launcher_is_left_alone(launch, reason):
    elsewhere = torch.ones(4)

    def launcher(x, y, scale, seed):
        out = torch.empty_like(x)
        if reason == "a copy":
            out.copy_(x)
        if reason == "a value that is read":
            out = torch.empty(int(x[0]))
        source = elsewhere if reason == "memory from elsewhere" else x[1:] if reason == "shared memory" else x
        changed = seed + (reason == "a changed seed")
        launch.launched(compiled("x *fp32", "out *fp32", "seed i32"), (1,), (source, out, changed))
        return out

    x = torch.ones(4)
    assert not watch(launch, launcher, x, x.view(4), 1.0, 5).understood
    assert reason != "shared memory" or watch(launch, launcher, x, torch.ones(4), 1.0, 5).understood


def test_a_launch_that_is_not_reported_is_noticed(launch):
    watched = launch.Watch((), {})

    def launcher():
        watched.num_launches += 1
        return torch.empty(4)

    watched.run(launcher)
    assert not watched.understood


def inputs(shape, dtype, count):
    """`count` times q, k, v and dout, of new values each time."""
    return [[torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4)] for _ in range(count)]


def attend(q, k, v, dout, **options):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = kernels.flash_attention(q, k, v, **options)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", ((2, 3, 65, 40), (3, 4, 640, 64), (1, 2, 1000, 128)))
def test_replayed_attention_gives_the_bits_of_the_first_call(shape, dtype):
    kernels.load("cuda")
    one, other = inputs(shape, dtype, 2)
    first = attend(*one, causal=True, softmax_scale=0.1)
    for _ in range(3):
        attend(*other, causal=True, softmax_scale=0.1)
    again = attend(*one, causal=True, softmax_scale=0.1)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.gpu
def test_replays_tell_arguments_apart_that_were_one_tensor():
    q, k, v, _ = inputs((2, 2, 300, 64), torch.bfloat16, 1)[0]
    expected = kernels.flash_attention(q, k, v, causal=True)
    for _ in range(4):
        kernels.flash_attention(q, q, q, causal=True)
    assert torch.equal(kernels.flash_attention(q, k, v, causal=True), expected)


@pytest.mark.gpu
def test_a_replay_can_be_captured_and_runs_on_the_current_stream():
    q, k, v, dout = inputs((2, 4, 512, 64), torch.bfloat16, 1)[0]
    expected = attend(q, k, v, dout, causal=True)
    for _ in range(3):
        attend(q, k, v, dout, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(q, k, v, dout, causal=True)
    for x in captured:
        x.zero_()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(expected, captured, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", (65, 50304))
def test_replays_take_the_seed_and_step_of_the_call(vocab_size):
    logits = torch.randn(3, vocab_size, device="cuda")
    for seed, step in ((0, 0), (1, 0), (2**31, 1), (2**40, 2), (2**40 + 1, 2), (3, 2**35), (4, 16), (5, 1), (1, 6)):
        drawn = kernels.sample(logits, top_k=40, seed=seed, step=step, return_logprobs=True)
        expected = kernels.sample(logits.cpu(), top_k=40, seed=seed, step=step, return_logprobs=True)
        assert torch.equal(drawn.token_ids.cpu(), expected.token_ids)
        torch.testing.assert_close(drawn.processed_logprobs.cpu(), expected.processed_logprobs)


@pytest.mark.gpu
def test_a_second_derivative_names_classic_attention():
    q, k, v, _ = (x.requires_grad_() for x in inputs((1, 2, 64, 64), torch.bfloat16, 1)[0])
    out = kernels.flash_attention(q, k, v)
    with pytest.raises(RuntimeError, match="classic_attention"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
