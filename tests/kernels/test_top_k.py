"""kernels.top_k: the same values, indices and order as a stable sort, on every device and in every dtype."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECIAL = (0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40, 65504.0)


def stable_sort(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Python's own stable sort of each row: NaN first, then descending, ties by index."""
    all_indices = []
    for row in x.tolist():
        order = sorted(range(len(row)), key=lambda i, row=row: (row[i] == row[i], -row[i] if row[i] == row[i] else 0))
        all_indices.append(order[:k])
    indices = torch.tensor(all_indices, dtype=torch.int64, device=x.device).view(x.shape[0], k)
    return x.gather(-1, indices), indices


def check(x: torch.Tensor, k: int) -> None:
    before = x.clone()
    values, indices = kernels.top_k(x, k)
    expected_values, expected_indices = stable_sort(x, k)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)
    assert values.dtype == x.dtype and indices.dtype == torch.int64
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "n", "k"),
    [(1, 1, 1), (3, 7, 3), (37, 32, 32), (5, 113, 64), (2, 1023, 40), (3, 4097, 50), (2, 20_011, 300), (1, 9001, 9001)],
)
def test_equals_a_stable_sort(device, dtype, batch, n, k):
    check(torch.randn(batch, n, device=device).to(dtype), k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(40, 11), (600, 64), (9000, 1025)])
def test_ties_go_to_the_lower_index(device, dtype, n, k):
    check(torch.randint(-2, 3, (4, n), device=device).to(dtype), k)
    check(torch.zeros(2, n, device=device, dtype=dtype), k)


@pytest.mark.parametrize("n", [50, 9000])
def test_order_of_the_row_does_not_matter(device, n):
    ascending = torch.linspace(-3, 3, n, device=device)[None]
    for k in (40, n // 30 + 30):
        check(ascending, k)
        check(ascending.flip(-1), k)


@pytest.mark.parametrize("k", [64, 300])
@pytest.mark.parametrize("lift", [9.0, -9.0])
def test_a_sample_of_the_row_may_mislead(device, k, lift):
    """Runs of neighbours at equal distances, such as a sample is made of, hold the best of the row, or its worst."""
    x = torch.randn(2, 20_011, device=device)
    places = torch.arange(512, device=device)
    x[:, places // 16 * (x.shape[1] // 32) + places % 16] += lift
    check(x, k)


@pytest.mark.parametrize("n", [100, 9000])
def test_special_values(device, n):
    x = torch.tensor(SPECIAL, device=device)[torch.randint(len(SPECIAL), (6, n), device=device)]
    x[5] = float("nan")
    for k in (1, 17, n):
        check(x, k)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_row(data):
    numbers = st.one_of(st.floats(width=32), st.sampled_from(SPECIAL), st.integers(-3, 3).map(float))
    row = data.draw(st.lists(numbers, min_size=1, max_size=200))
    k = data.draw(st.integers(1, len(row)))
    dtype = data.draw(st.sampled_from(DTYPES))
    check(torch.tensor([row], dtype=torch.float32).to(dtype), k)


def test_strides_and_leading_dimensions(device):
    x = torch.randn(6, 40, 70, device=device)
    values, indices = kernels.top_k(x, 5)
    assert values.shape == indices.shape == (6, 40, 5)
    for view in (x[:, 7], x[:, :, 3].contiguous().t(), x[::2, 3, 5:50], x[0].expand(40, 70), x[0, :1].expand(9, 70)):
        check(view, 5)
    values, indices = kernels.top_k(x[2, 3], 70)
    assert torch.equal(values, x[2, 3].sort(descending=True).values)
    assert kernels.top_k(x[:0, 0], 5)[0].shape == (0, 5)


def test_gradient_goes_to_where_the_value_was_taken(device):
    x = torch.randn(3, 300, device=device, requires_grad=True)
    values, indices = kernels.top_k(x, 4)
    dvalues = torch.randn_like(values)
    (dx,) = torch.autograd.grad(values, x, dvalues)
    assert torch.equal(dx, torch.zeros_like(x).scatter(-1, indices, dvalues))


def test_bad_arguments_are_named(device):
    x = torch.randn(2, 10, device=device)
    for k in (0, -1, 11, 2.0, None):
        with pytest.raises(ValueError, match=r"^k: got .* from 1 to 10"):
            kernels.top_k(x, k)
    for dtype in (torch.float64, torch.int64):
        with pytest.raises(ValueError, match=r"^x: got torch.* needs float32, float16 or bfloat16"):
            kernels.top_k(x.to(dtype), 1)


def test_registered_as_torch_asks(device):
    kernels.load(device)
    op = torch.ops.kernels.top_k.default
    for x in (torch.randn(3, 50, device=device), torch.randn(50, 3, device=device).t()[:, ::2].contiguous()):
        torch.library.opcheck(op, (x, 3))


def test_compiles_whole(device):
    compiled = torch.compile(lambda x: kernels.top_k(x * 2.0, 7), fullgraph=True)
    x = torch.randn(4, 200, device=device)
    for expected, got in zip(kernels.top_k(x * 2.0, 7), compiled(x), strict=True):
        assert torch.equal(expected, got)
