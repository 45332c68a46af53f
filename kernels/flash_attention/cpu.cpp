// FlashAttention-2 on the CPU: forward, backward, packed documents and decoding over a cache.
//
//   S = softmax_scale Q K^T    P = softmax(S)    O = P V    lse = log(sum exp S)
//
//   dV = P^T dO    dP = dO V^T    delta = rowsum(dO * O) - dlse    dS = P * (dP - delta)
//   dQ = softmax_scale dS K    dK = softmax_scale dS^T Q
//
// Everything is computed transposed, S^T = K Q^T and O^T = V^T P^T, with the queries of a block side by side in vector
// lanes: row_max, row_sum and the rescaling are then plain vector arithmetic, and K and V are read one element at a time
// (broadcast), so that they need no packing.
//
//               kBlockM queries (lanes)            Forward, one task: one Q block of one head. Loops over K, V blocks.
//               +-----------------+                Backward, one task: one key head, or a share of its query blocks.
//               |  Q^T [D, M]     |                Loops over chunks of queries, then K, V blocks, then Q blocks.
//   K, V        +-----------------+
//   +--------+  +-----------------+
//   | [N, D] |  | S^T, P^T [N, M] |                O^T [D, M] += V^T P^T
//   +--------+  +-----------------+                dK, dV [N, D] += dS^T Q, P^T dO    dQ^T [D, M] += K^T dS^T
//
// FlashAttention-2 (arXiv:2307.08691). Forward: algorithm 1, the loop of lines 6 to 11 in forward_block. Backward: algorithm
// 2, the loops of lines 6 to 17 in backward_task.
//   paper   B_r      B_c      m        l        O~   L    D      tau
//   here    kBlockM  kBlockN  row_max  row_sum  acc  lse  delta  softmax_scale
//
// Deterministic: no atomics on data, and every sum in an order given by the shapes alone. The bits do not depend on the
// number of threads.
//
// fp64 is computed in fp64; fp32, fp16 and bf16 in fp32.
//
// Knows torch's stable ABI and its own folder; knows nothing of autograd (op.py) or of how it is compiled (load.py).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "flash_attention/microkernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlockM = 64;       // queries in a block: lanes
constexpr int64_t kBlockN = 64;       // keys in a block
constexpr int64_t kChunk = 512;       // queries whose gradients stay in the cache while the keys pass by
constexpr int64_t kBackwardTasks = 16;  // the backward pass is cut into at least so many, where it is long enough
constexpr int64_t kDecodeSplit = 512;  // keys of one decoding task
constexpr int64_t kDecodeRows = 16;   // more query rows than this per key head are no longer decoding

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Element types

#if defined(__FLT16_MANT_DIG__)
using Half = _Float16;
#else
using Half = torch::headeronly::Half;
#endif

struct BFloat16 {
  uint16_t bits;
};

template <class A, class T>
inline A widen(T x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return static_cast<A>(y);
  } else {
    return static_cast<A>(static_cast<float>(x));
  }
}
template <>
inline double widen<double, double>(double x) {
  return x;
}

template <class T, class A>
inline T narrow(A x) {
  if constexpr (std::is_same_v<T, BFloat16>) {  // round to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const bool nan = x != x;
    return {static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  } else {
    return static_cast<T>(x);
  }
}

template <class F>
void visit(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: return f(double{});
  }
}

// Tensors as the kernels see them

// One head of one sequence: (seqlen, head_dim), or (seqlen,) for lse. Strides in elements.
struct Matrix {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t row_stride = 0, dim_stride = 0;

  template <class T>
  T* row(int64_t i) const {
    return reinterpret_cast<T*>(data) + i * row_stride;
  }
  Matrix from(int64_t i) const {  // without the first i rows
    const int64_t item = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    return {data + i * row_stride * item, dtype, row_stride, dim_stride};
  }
};

// All heads of all sequences. In packed documents batch_stride is 0 and a sequence starts at a row.
struct Heads {
  Matrix first;
  int64_t batch_stride = 0, head_stride = 0;

  Heads() = default;
  Heads(const Tensor& x, bool packed, bool has_dim) {
    const auto strides = x.strides();
    first.data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
    first.dtype = x.scalar_type();
    if (packed) {  // (total, heads, head_dim) or (heads, total)
      head_stride = strides[has_dim ? 1 : 0];
      first.row_stride = strides[has_dim ? 0 : 1];
    } else {  // (batch, heads, seqlen, head_dim) or (batch, heads, seqlen)
      batch_stride = strides[0];
      head_stride = strides[1];
      first.row_stride = strides[2];
    }
    if (has_dim) first.dim_stride = strides[strides.size() - 1];
  }

  Matrix at(int64_t batch, int64_t head, int64_t row) const {
    const int64_t item = first.dtype == ScalarType::Double ? 8 : first.dtype == ScalarType::Float ? 4 : 2;
    Matrix matrix = first;
    matrix.data += (batch * batch_stride + head * head_stride + row * first.row_stride) * item;
    return matrix;
  }
};

struct Options {
  double softmax_scale;
  bool causal;
  int64_t window_size;  // 0: none
  double softcap;       // 0: none
};

struct Sequence {
  int64_t batch, q_row, k_row, seqlen_q, seqlen_k;
};

struct Problem {
  int64_t num_heads, num_kv_heads, head_dim;
  Options options;
  std::vector<Sequence> sequences;

  int64_t groups() const { return num_heads / num_kv_heads; }
};

// Which keys a query sees: key_begin(i) <= j < key_end(i). Both grow with i.
struct Visible {
  int64_t seqlen_k, offset;
  bool causal;
  int64_t window;

  Visible(const Options& options, const Sequence& sequence)
      : seqlen_k(sequence.seqlen_k),
        offset(sequence.seqlen_k - sequence.seqlen_q),
        causal(options.causal),
        window(std::min<int64_t>(options.window_size, int64_t{1} << 40)) {}

  int64_t key_begin(int64_t i) const {
    return window ? std::clamp<int64_t>(i + offset - window + 1, 0, seqlen_k) : 0;
  }
  int64_t key_end(int64_t i) const {
    if (causal) return std::clamp<int64_t>(i + offset + 1, 0, seqlen_k);
    return window ? std::clamp<int64_t>(i + offset + window, 0, seqlen_k) : seqlen_k;
  }
};

// Memory that a thread keeps from one call to the next.

template <class A>
class Buffer {
 public:
  A* at_least(int64_t count) {
    if (count > size_) {
      data_.reset(static_cast<A*>(std::aligned_alloc(64, round_up(count * sizeof(A), 64))));
      if (!data_) throw std::bad_alloc();
      size_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(A* p) const { std::free(p); }
  };
  std::unique_ptr<A, Free> data_;
  int64_t size_ = 0;
};

// Copies between a tensor and a block in A, zero beyond what the tensor has.

// block [padded_rows][block_row] = matrix[0:rows, 0:dims]
template <class A>
void read_rows(const Matrix& matrix, int64_t rows, int64_t dims, A* block, int64_t block_row, int64_t padded_rows) {
  visit(matrix.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < rows; ++i) {
      const T* row = matrix.row<T>(i);
      A* to = block + i * block_row;
      if (matrix.dim_stride == 1)
        for (int64_t d = 0; d < dims; ++d) to[d] = widen<A>(row[d]);
      else
        for (int64_t d = 0; d < dims; ++d) to[d] = widen<A>(row[d * matrix.dim_stride]);
      std::fill(to + dims, to + block_row, A{0});
    }
  });
  std::fill(block + rows * block_row, block + padded_rows * block_row, A{0});
}

// block [dims][kBlockM] = factor * matrix[0:rows, 0:dims]^T
template <class A>
void read_transposed(const Matrix& matrix, int64_t rows, int64_t dims, A factor, A* block) {
  visit(matrix.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < rows; ++i) {
      const T* row = matrix.row<T>(i);
      for (int64_t d = 0; d < dims; ++d) block[d * kBlockM + i] = factor * widen<A>(row[d * matrix.dim_stride]);
    }
  });
  for (int64_t d = 0; d < dims; ++d) std::fill(block + d * kBlockM + rows, block + (d + 1) * kBlockM, A{0});
}

// matrix[0:rows, 0:dims] = factor * block, block [rows][block_row]
template <class A>
void write_rows(const Matrix& matrix, int64_t rows, int64_t dims, A factor, const A* block, int64_t block_row) {
  visit(matrix.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < rows; ++i) {
      T* row = matrix.row<T>(i);
      for (int64_t d = 0; d < dims; ++d) row[d * matrix.dim_stride] = narrow<T>(factor * block[i * block_row + d]);
    }
  });
}

// matrix[0:rows, 0:dims] = (block * factors)^T, block [dims][kBlockM], factors [kBlockM]
template <class A>
void write_transposed(const Matrix& matrix, int64_t rows, int64_t dims, const A* factors, const A* block) {
  visit(matrix.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < rows; ++i) {
      T* row = matrix.row<T>(i);
      for (int64_t d = 0; d < dims; ++d) row[d * matrix.dim_stride] = narrow<T>(factors[i] * block[d * kBlockM + i]);
    }
  });
}

// K or V rows as an operand whose elements are broadcast: in place if they are in A already, else a copy in `scratch`.
template <class A>
struct Operand {
  const A* data;
  int64_t row_stride, dim_stride;

  Operand(const Matrix& matrix, int64_t first_row, int64_t rows, int64_t dims, Buffer<A>& scratch) {
    const bool compact = matrix.dim_stride == 1 && matrix.row_stride <= 256;  // long strides share few cache sets
    if (compact && (matrix.dtype == ScalarType::Double || (matrix.dtype == ScalarType::Float && sizeof(A) == 4))) {
      data = matrix.row<A>(first_row);
      row_stride = matrix.row_stride;
      dim_stride = 1;
      return;
    }
    A* copy = scratch.at_least(kBlockN * dims);
    read_rows(matrix.from(first_row), rows, dims, copy, dims, rows);
    data = copy;
    row_stride = dims;
    dim_stride = 1;
  }
};

// Tasks

// Runs f(task) for every task on torch's threads; whoever is free takes the next one.
template <class F>
void for_each_task(int64_t tasks, double flops, const F& f) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (threads <= 1 || flops < 1e6) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(task);
  });
}

// Stages that forward and backward share

// How a raw score becomes one: s, in units of which exp2(factor * s) is the weight. The sign of softmax_scale is put
// into Q^T, so that the greatest raw score is the greatest score; factor is above 0, so that -inf * factor is -inf.
template <class A>
struct Scores {
  A sign, factor, before_cap;

  explicit Scores(const Options& options) {
    const double scale = std::abs(options.softmax_scale);
    sign = options.softmax_scale < 0 ? A{-1} : A{1};
    const double after = options.softcap > 0 ? options.softcap : scale;
    factor = std::max<A>(static_cast<A>(after * kLog2E), std::numeric_limits<float>::min());
    before_cap = options.softcap > 0 ? static_cast<A>(scale / options.softcap) : A{0};
  }
};

// s = tanh(scale s / softcap), which `factor` multiplies by softcap. s [keys][kBlockM]
template <class A>
void soft_cap(A* s, int64_t keys, int64_t columns, A before_cap) {
  for (int64_t n = 0; n < keys; ++n)
    for (int64_t j = 0; j < columns; j += kWidth<A>) {
      A* at = s + n * kBlockM + j;
      store(at, tanh(load(at) * before_cap));
    }
}

// Does some query of [row_begin, row_end) not see some key of [key_begin, key_end)?
inline bool needs_mask(const Visible& visible, int64_t row_begin, int64_t row_end, int64_t key_begin, int64_t key_end) {
  return visible.key_begin(row_end - 1) > key_begin || visible.key_end(row_begin) < key_end;
}

// s = -inf where the query does not see the key, and in lanes that hold no query. s [keys][kBlockM]
template <class A>
void mask(const Visible& visible, int64_t row_begin, int64_t rows, int64_t key_begin, int64_t keys, int64_t columns, A* s) {
  alignas(64) A first[kBlockM], last[kBlockM];
  for (int64_t m = 0; m < columns; ++m) {
    const int64_t row = row_begin + m;
    first[m] = m < rows ? static_cast<A>(visible.key_begin(row) - key_begin) : A{0};
    last[m] = m < rows ? static_cast<A>(visible.key_end(row) - key_begin) : A{0};
  }
  const Vec<A> hidden = broadcast(-std::numeric_limits<A>::infinity());
  for (int64_t n = 0; n < keys; ++n) {
    const Vec<A> key = broadcast(static_cast<A>(n));
    for (int64_t j = 0; j < columns; j += kWidth<A>) {
      A* at = s + n * kBlockM + j;
      store(at, select<A>((load(first + j) <= key) & (key < load(last + j)), load(at), hidden));
    }
  }
}

// Forward

template <class A>
struct ForwardBuffers {
  Buffer<A> q_t, k, v, s, acc;
};

// The running maximum and sum of each query of a block, and what the last tile multiplied older results by.
template <class A>
struct OnlineSoftmax {
  alignas(64) A row_max[kBlockM], row_sum[kBlockM], alpha[kBlockM];

  OnlineSoftmax() {
    std::fill_n(row_max, kBlockM, -std::numeric_limits<A>::infinity());
    std::fill_n(row_sum, kBlockM, A{0});
  }

  // s [keys][kBlockM] becomes p. -inf - (-inf) is kept from happening here alone: a row that has seen no key takes 0
  // for its maximum, so that its weights are exp2(-inf) = 0.
  void update(A* s, int64_t keys, int64_t columns, A factor) {
    constexpr int W = kWidth<A>;
    for (int64_t j = 0; j < columns; j += W) {
      const Vec<A> old_max = load(row_max + j);
      Vec<A> new_max = old_max;
      for (int64_t n = 0; n < keys; ++n) new_max = max<A>(load(s + n * kBlockM + j), new_max);
      const Vec<A> shift = select<A>(new_max == -std::numeric_limits<A>::infinity(), Vec<A>{}, new_max * factor);
      Vec<A> sum{};
      for (int64_t n = 0; n < keys; ++n) {
        A* at = s + n * kBlockM + j;
        const Vec<A> p = exp2(load(at) * factor - shift);
        store(at, p);
        sum += p;
      }
      const Vec<A> rescale = exp2(old_max * factor - shift);
      store(alpha + j, rescale);
      store(row_max + j, new_max);
      store(row_sum + j, load(row_sum + j) * rescale + sum);
    }
  }
};

// out and lse of one block of queries of one head.
template <class A>
void forward_block(
    const Problem& problem, const Sequence& sequence, int64_t row_begin, const Matrix& q, const Matrix& k,
    const Matrix& v, const Matrix& out, const Matrix& lse) {
  thread_local ForwardBuffers<A> buffers;
  const int64_t head_dim = problem.head_dim;
  const int64_t rows = std::min(kBlockM, sequence.seqlen_q - row_begin);
  const int64_t columns = round_up(rows, kWidth<A>);
  const Visible visible(problem.options, sequence);
  const Scores<A> scores(problem.options);

  A* q_t = buffers.q_t.at_least(head_dim * kBlockM);  // [head_dim][kBlockM]
  A* s = buffers.s.at_least(kBlockN * kBlockM);       // [kBlockN][kBlockM], S^T and then P^T
  A* acc = buffers.acc.at_least(head_dim * kBlockM);  // [head_dim][kBlockM], O^T
  read_transposed(q, rows, head_dim, scores.sign, q_t);
  std::fill_n(acc, head_dim * kBlockM, A{0});
  OnlineSoftmax<A> softmax;

  const int64_t keys_begin = visible.key_begin(row_begin), keys_end = visible.key_end(row_begin + rows - 1);
  for (int64_t n = keys_begin; n < keys_end; n += kBlockN) {
    const int64_t keys = std::min(kBlockN, keys_end - n);

    // S^T = K Q^T
    const Operand<A> k_block(k, n, keys, head_dim, buffers.k);
    multiply<A>(keys, columns, head_dim, k_block.data, k_block.row_stride, k_block.dim_stride, q_t, kBlockM, s, kBlockM, true);

    // Mask
    if (problem.options.softcap > 0) soft_cap(s, keys, columns, scores.before_cap);
    if (needs_mask(visible, row_begin, row_begin + rows, n, n + keys)) mask(visible, row_begin, rows, n, keys, columns, s);

    // Online softmax
    softmax.update(s, keys, columns, scores.factor);

    // Rescale; O^T += V^T P^T
    const Operand<A> v_block(v, n, keys, head_dim, buffers.v);
    multiply<A>(
        head_dim, columns, keys, v_block.data, v_block.dim_stride, v_block.row_stride, s, kBlockM, acc, kBlockM, false,
        softmax.alpha);
  }

  // O = O / row_sum
  for (int64_t m = 0; m < rows; ++m) {
    const A sum = softmax.row_sum[m];
    const bool empty = sum == 0;
    softmax.alpha[m] = empty ? A{0} : 1 / sum;
    *lse.row<A>(m) = empty ? -std::numeric_limits<A>::infinity()
                           : static_cast<A>((softmax.row_max[m] * scores.factor + std::log2(sum)) * A(kLn2));
  }
  write_transposed(out, rows, head_dim, softmax.alpha, acc);
}

// Where each sequence's query blocks start in one long list of them.
std::vector<int64_t> count_blocks(const std::vector<Sequence>& sequences, int64_t block) {
  std::vector<int64_t> starts{0};
  for (const Sequence& sequence : sequences) starts.push_back(starts.back() + ceil_div(sequence.seqlen_q, block));
  return starts;
}

double count_flops(const Problem& problem) {
  double pairs = 0;
  for (const Sequence& sequence : problem.sequences)
    pairs += static_cast<double>(sequence.seqlen_q) * static_cast<double>(sequence.seqlen_k);
  return 4.0 * pairs * static_cast<double>(problem.num_heads * problem.head_dim) * (problem.options.causal ? 0.5 : 1.0);
}

template <class A>
void forward_all(const Problem& problem, const Heads& q, const Heads& k, const Heads& v, const Heads& out, const Heads& lse) {
  const std::vector<int64_t> starts = count_blocks(problem.sequences, kBlockM);
  const int64_t blocks = starts.back();
  for_each_task(blocks * problem.num_heads, count_flops(problem), [&](int64_t task) {
    // Head after head, so that its keys stay in the cache; the last block first, because under a causal mask it is the longest.
    const int64_t head = task / blocks, block = blocks - 1 - task % blocks;
    const int64_t index = std::upper_bound(starts.begin(), starts.end(), block) - starts.begin() - 1;
    const Sequence& sequence = problem.sequences[index];
    const int64_t row = (block - starts[index]) * kBlockM, b = sequence.batch, kv_head = head / problem.groups();
    forward_block<A>(
        problem, sequence, row, q.at(b, head, sequence.q_row + row), k.at(b, kv_head, sequence.k_row),
        v.at(b, kv_head, sequence.k_row), out.at(b, head, sequence.q_row + row), lse.at(b, head, sequence.q_row + row));
  });
}

// Backward

template <class A>
struct BackwardBuffers {
  Buffer<A> q_t, dout_t, q, dout, dq_t, lse, delta, k, v, s, dp, dk, dv;
};

struct BackwardHeads {
  Heads dout, dlse, q, k, v, out, lse, dq, dk, dv;
  bool has_dlse;
};

// s becomes p and dp becomes ds. [keys][kBlockM]. A hidden key has s = -inf, and so p = ds = 0.
template <class A>
void softmax_backward(A* s, A* dp, const A* lse, const A* delta, int64_t keys, int64_t columns, A factor, bool capped) {
  for (int64_t n = 0; n < keys; ++n)
    for (int64_t j = 0; j < columns; j += kWidth<A>) {
      A* s_at = s + n * kBlockM + j;
      A* dp_at = dp + n * kBlockM + j;
      const Vec<A> score = load(s_at);
      const Vec<A> p = exp2(score * factor - load(lse + j));
      Vec<A> ds = p * (load(dp_at) - load(delta + j));
      if (capped) ds = select<A>(p == A{0}, p, ds * (A{1} - score * score));  // d tanh(x) = 1 - tanh(x)^2
      store(s_at, p);
      store(dp_at, ds);
    }
}

// What the backward pass needs of a chunk of queries, block after block: q_t, dout_t [head_dim][kBlockM], q, dout
// [kBlockM][padded_dim], lse (in units of exp2) and delta [kBlockM].
template <class A>
void read_chunk(const BackwardHeads& x, const Problem& problem, const Sequence& sequence, int64_t head, int64_t row_begin,
                int64_t row_end, BackwardBuffers<A>& buffers) {
  const int64_t head_dim = problem.head_dim, padded_dim = round_up(head_dim, kWidth<A>), b = sequence.batch;
  const Scores<A> scores(problem.options);
  for (int64_t row = row_begin; row < row_end; row += kBlockM) {
    const int64_t block = (row - row_begin) / kBlockM, rows = std::min(kBlockM, row_end - row);
    const int64_t first = sequence.q_row + row;
    const Matrix q = x.q.at(b, head, first), dout = x.dout.at(b, head, first), out = x.out.at(b, head, first);
    const Matrix lse = x.lse.at(b, head, first);
    A* dout_rows = buffers.dout.at_least(0) + block * kBlockM * padded_dim;
    read_transposed(q, rows, head_dim, scores.sign, buffers.q_t.at_least(0) + block * head_dim * kBlockM);
    read_transposed(dout, rows, head_dim, A{1}, buffers.dout_t.at_least(0) + block * head_dim * kBlockM);
    read_rows(q, rows, head_dim, buffers.q.at_least(0) + block * kBlockM * padded_dim, padded_dim, kBlockM);
    read_rows(dout, rows, head_dim, dout_rows, padded_dim, kBlockM);

    // delta = rowsum(dO * O) - dlse
    A* lse_at = buffers.lse.at_least(0) + block * kBlockM;
    A* delta_at = buffers.delta.at_least(0) + block * kBlockM;
    std::fill_n(lse_at, kBlockM, A{0});
    std::fill_n(delta_at, kBlockM, A{0});
    for (int64_t i = 0; i < rows; ++i) {
      const A lse_i = *lse.row<A>(i);
      lse_at[i] = lse_i == -std::numeric_limits<A>::infinity() ? A{0} : lse_i * A(kLog2E);
      if (x.has_dlse) delta_at[i] = -*x.dlse.at(b, head, first + i).template row<A>(0);
    }
    visit(out.dtype, [&](auto zero) {
      using T = decltype(zero);
      for (int64_t i = 0; i < rows; ++i) {
        const T* out_row = out.row<T>(i);
        A sum{0};
        for (int64_t d = 0; d < head_dim; ++d)
          sum += widen<A>(out_row[d * out.dim_stride]) * dout_rows[i * padded_dim + d];
        delta_at[i] += sum;
      }
    });
  }
}

// dq of the queries [row_begin, row_end) of one head; what they add to dk and dv goes into dk, dv [seqlen_k][padded_dim].
template <class A>
void backward_chunk(const BackwardHeads& x, const Problem& problem, const Sequence& sequence, int64_t head,
                    int64_t row_begin, int64_t row_end, BackwardBuffers<A>& buffers, A* dk, A* dv) {
  const int64_t head_dim = problem.head_dim, padded_dim = round_up(head_dim, kWidth<A>), b = sequence.batch;
  const int64_t kv_head = head / problem.groups();
  const bool capped = problem.options.softcap > 0;
  const Visible visible(problem.options, sequence);
  const Scores<A> scores(problem.options);
  const Matrix k = x.k.at(b, kv_head, sequence.k_row), v = x.v.at(b, kv_head, sequence.k_row);

  const int64_t blocks = ceil_div(row_end - row_begin, kBlockM);
  A* q_t = buffers.q_t.at_least(blocks * head_dim * kBlockM);
  A* dout_t = buffers.dout_t.at_least(blocks * head_dim * kBlockM);
  A* q = buffers.q.at_least(blocks * kBlockM * padded_dim);
  A* dout = buffers.dout.at_least(blocks * kBlockM * padded_dim);
  A* lse = buffers.lse.at_least(blocks * kBlockM);
  A* delta = buffers.delta.at_least(blocks * kBlockM);
  A* dq_t = buffers.dq_t.at_least(blocks * head_dim * kBlockM);
  A* s = buffers.s.at_least(kBlockN * kBlockM);
  A* dp = buffers.dp.at_least(kBlockN * kBlockM);
  read_chunk(x, problem, sequence, head, row_begin, row_end, buffers);
  std::fill_n(dq_t, blocks * head_dim * kBlockM, A{0});

  const int64_t keys_begin = visible.key_begin(row_begin), keys_end = visible.key_end(row_end - 1);
  for (int64_t n = keys_begin; n < keys_end; n += kBlockN) {
    const int64_t keys = std::min(kBlockN, keys_end - n);
    const Operand<A> k_block(k, n, keys, head_dim, buffers.k);
    const Operand<A> v_block(v, n, keys, head_dim, buffers.v);

    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = row_begin + block * kBlockM, rows = std::min(kBlockM, row_end - row);
      const int64_t columns = round_up(rows, kWidth<A>);
      if (visible.key_end(row + rows - 1) <= n || visible.key_begin(row) >= n + keys) continue;
      const A* q_t_block = q_t + block * head_dim * kBlockM;
      const A* dout_t_block = dout_t + block * head_dim * kBlockM;
      const A* q_block = q + block * kBlockM * padded_dim;
      const A* dout_block = dout + block * kBlockM * padded_dim;

      // S^T = K Q^T
      multiply<A>(keys, columns, head_dim, k_block.data, k_block.row_stride, k_block.dim_stride, q_t_block, kBlockM, s, kBlockM, true);

      // Mask
      if (capped) soft_cap(s, keys, columns, scores.before_cap);
      if (needs_mask(visible, row, row + rows, n, n + keys)) mask(visible, row, rows, n, keys, columns, s);

      // dP^T = V dO^T; P^T = exp(S^T - lse); dS^T = P^T * (dP^T - delta)
      multiply<A>(keys, columns, head_dim, v_block.data, v_block.row_stride, v_block.dim_stride, dout_t_block, kBlockM, dp, kBlockM, true);
      softmax_backward(s, dp, lse + block * kBlockM, delta + block * kBlockM, keys, columns, scores.factor, capped);

      // dV += P^T dO; dK += dS^T Q; dQ^T += K^T dS^T
      multiply<A>(keys, padded_dim, rows, s, kBlockM, 1, dout_block, padded_dim, dv + n * padded_dim, padded_dim, false);
      multiply<A>(keys, padded_dim, rows, dp, kBlockM, 1, q_block, padded_dim, dk + n * padded_dim, padded_dim, false);
      multiply<A>(
          head_dim, columns, keys, k_block.data, k_block.dim_stride, k_block.row_stride, dp, kBlockM,
          dq_t + block * head_dim * kBlockM, kBlockM, false);
    }
  }

  alignas(64) A factors[kBlockM];
  std::fill_n(factors, kBlockM, static_cast<A>(problem.options.softmax_scale));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = row_begin + block * kBlockM;
    write_transposed(x.dq.at(b, head, sequence.q_row + row), std::min(kBlockM, row_end - row), head_dim, factors,
                     dq_t + block * head_dim * kBlockM);
  }
}

// One task is one key head, with all query heads that share it; dk and dv add up in memory of its own. Where there are
// few key heads, the chunks of queries are dealt out to several tasks ("shares"), whose dk and dv are added at the end,
// always in the same order. How many shares there are depends on the shapes alone.
template <class A>
void backward_all(const Problem& problem, const BackwardHeads& x) {
  const int64_t num_sequences = static_cast<int64_t>(problem.sequences.size()), num_kv_heads = problem.num_kv_heads;
  const int64_t head_dim = problem.head_dim, padded_dim = round_up(head_dim, kWidth<A>), groups = problem.groups();
  int64_t longest_q = 0, longest_k = 0;
  for (const Sequence& sequence : problem.sequences) {
    longest_q = std::max(longest_q, sequence.seqlen_q);
    longest_k = std::max(longest_k, sequence.seqlen_k);
  }
  const int64_t heads = num_sequences * num_kv_heads;
  if (heads == 0) return;
  const int64_t units = groups * ceil_div(longest_q, kChunk);
  const int64_t shares = std::clamp<int64_t>(ceil_div(kBackwardTasks, heads), 1, std::max<int64_t>(units, 1));
  const int64_t gradient = longest_k * padded_dim;  // elements of one dk
  Buffer<A> partials;                               // [heads][shares][dk, dv][seqlen_k][padded_dim]
  if (shares > 1) partials.at_least(heads * shares * 2 * gradient);

  const auto write = [&](int64_t index, int64_t kv_head, const A* dk, const A* dv) {
    const Sequence& sequence = problem.sequences[index];
    const A scale = static_cast<A>(problem.options.softmax_scale);
    write_rows(x.dk.at(sequence.batch, kv_head, sequence.k_row), sequence.seqlen_k, head_dim, scale, dk, padded_dim);
    write_rows(x.dv.at(sequence.batch, kv_head, sequence.k_row), sequence.seqlen_k, head_dim, A{1}, dv, padded_dim);
  };

  for_each_task(heads * shares, 2.5 * count_flops(problem), [&](int64_t task) {
    thread_local BackwardBuffers<A> buffers;
    const int64_t share = task % shares, index = task / shares / num_kv_heads, kv_head = task / shares % num_kv_heads;
    const Sequence& sequence = problem.sequences[index];
    A* dk = shares > 1 ? partials.at_least(0) + task * 2 * gradient : buffers.dk.at_least(gradient);
    A* dv = shares > 1 ? dk + gradient : buffers.dv.at_least(gradient);
    std::fill_n(dk, sequence.seqlen_k * padded_dim, A{0});
    std::fill_n(dv, sequence.seqlen_k * padded_dim, A{0});
    const int64_t chunks = ceil_div(sequence.seqlen_q, kChunk);
    for (int64_t unit = share; unit < groups * chunks; unit += shares) {
      const int64_t head = kv_head * groups + unit / chunks, row = unit % chunks * kChunk;
      backward_chunk(x, problem, sequence, head, row, std::min(row + kChunk, sequence.seqlen_q), buffers, dk, dv);
    }
    if (shares == 1) write(index, kv_head, dk, dv);
  });
  if (shares == 1) return;

  for_each_task(heads, 2.5 * count_flops(problem), [&](int64_t task) {
    A* sum = partials.at_least(0) + task * shares * 2 * gradient;
    for (int64_t share = 1; share < shares; ++share)
      for (int64_t i = 0; i < 2 * gradient; ++i) sum[i] += sum[share * 2 * gradient + i];
    write(task / num_kv_heads, task % num_kv_heads, sum, sum + gradient);
  });
}

// Decoding: few queries, so that the cache is read once and every vector lies along head_dim.

template <class A>
struct DecodeBuffers {
  Buffer<A> q, k, v, s;
};

// Rows of a cache in A with head_dim along vectors: in place if they are so already, else a copy in `scratch`.
template <class A>
const A* vector_rows(const Matrix& matrix, int64_t first_row, int64_t rows, int64_t dims, Buffer<A>& scratch, int64_t* stride) {
  const bool same = matrix.dtype == ScalarType::Double || (matrix.dtype == ScalarType::Float && sizeof(A) == 4);
  const int64_t padded = round_up(dims, kWidth<A>);
  *stride = same && padded == dims && matrix.dim_stride == 1 ? matrix.row_stride : padded;
  if (same && padded == dims && matrix.dim_stride == 1) return matrix.row<A>(first_row);
  A* copy = scratch.at_least(kBlockN * padded);
  read_rows(matrix.from(first_row), rows, dims, copy, padded, rows);
  return copy;
}

// The softmax of one row of scores against what came before; s [kBlockN] becomes p. Returns the factor for older results.
template <class A>
A online_softmax_row(A* s, A factor, A* row_max, A* row_sum) {
  constexpr A kHidden = -std::numeric_limits<A>::infinity();
  const A old_max = *row_max;
  A new_max = old_max;
  for (int64_t i = 0; i < kBlockN; ++i) new_max = new_max < s[i] ? s[i] : new_max;
  const A shift = new_max == kHidden ? A{0} : new_max * factor;
  Vec<A> sum{};
  for (int64_t i = 0; i < kBlockN; i += kWidth<A>) {
    const Vec<A> p = exp2(load(s + i) * factor - shift);
    store(s + i, p);
    sum += p;
  }
  const A alpha = std::exp2(old_max * factor - shift);
  A total{0};
  for (int lane = 0; lane < kWidth<A>; ++lane) total += sum[lane];
  *row_max = new_max;
  *row_sum = *row_sum * alpha + total;
  return alpha;
}

// The queries of the heads that share a key head, over keys [key_begin, key_end): acc [rows][padded_dim], not yet divided
// by row_sum, and row_max, row_sum [rows]. Row r is query r % seqlen_q of head r / seqlen_q of the group.
template <class A>
void decode_split(const Problem& problem, const Sequence& sequence, int64_t kv_head, int64_t key_begin, int64_t key_end,
                  const Heads& q, const Matrix& k, const Matrix& v, A* acc, A* row_max, A* row_sum) {
  thread_local DecodeBuffers<A> buffers;
  constexpr int W = kWidth<A>;
  const int64_t head_dim = problem.head_dim, padded_dim = round_up(head_dim, W), groups = problem.groups();
  const int64_t seqlen_q = sequence.seqlen_q, rows = groups * seqlen_q;
  const Visible visible(problem.options, sequence);
  const Scores<A> scores(problem.options);
  A* q_rows = buffers.q.at_least(rows * padded_dim);
  A* s = buffers.s.at_least(rows * kBlockN);
  for (int64_t group = 0; group < groups; ++group)
    read_rows(q.at(sequence.batch, kv_head * groups + group, 0), seqlen_q, head_dim,
              q_rows + group * seqlen_q * padded_dim, padded_dim, seqlen_q);
  std::fill_n(acc, rows * padded_dim, A{0});
  std::fill_n(row_max, rows, -std::numeric_limits<A>::infinity());
  std::fill_n(row_sum, rows, A{0});

  key_begin = std::max(key_begin, visible.key_begin(0));
  key_end = std::min(key_end, visible.key_end(seqlen_q - 1));
  for (int64_t n = key_begin; n < key_end; n += kBlockN) {
    const int64_t keys = std::min(kBlockN, key_end - n);
    int64_t k_stride, v_stride;
    const A* k_rows = vector_rows(k, n, keys, head_dim, buffers.k, &k_stride);
    const A* v_rows = vector_rows(v, n, keys, head_dim, buffers.v, &v_stride);

    for (int64_t r = 0; r < rows; ++r) {
      // S = Q K^T, mask
      const int64_t first = visible.key_begin(r % seqlen_q) - n, last = std::min(keys, visible.key_end(r % seqlen_q) - n);
      A* s_row = s + r * kBlockN;
      for (int64_t i = 0; i < kBlockN; ++i) {
        s_row[i] = -std::numeric_limits<A>::infinity();
        if (i < first || i >= last) continue;
        Vec<A> sum{};
        for (int64_t d = 0; d < padded_dim; d += W) sum += load(q_rows + r * padded_dim + d) * load(k_rows + i * k_stride + d);
        A score{0};
        for (int lane = 0; lane < W; ++lane) score += sum[lane];
        s_row[i] = scores.sign * score;
        if (problem.options.softcap > 0) s_row[i] = std::tanh(s_row[i] * scores.before_cap);
      }

      // Online softmax; rescale
      const A alpha = online_softmax_row(s_row, scores.factor, row_max + r, row_sum + r);
      for (int64_t d = 0; d < padded_dim; ++d) acc[r * padded_dim + d] *= alpha;
    }

    // O += P V
    multiply<A>(rows, padded_dim, keys, s, kBlockN, 1, v_rows, v_stride, acc, padded_dim, false);
  }
}

// Where a softmax's parts were computed apart, out = sum of 2^(max_i - max) acc_i / sum of 2^(max_i - max) sum_i.
template <class A>
void combine_splits(const A* acc, const A* row_max, const A* row_sum, int64_t splits, int64_t rows, int64_t row,
                    int64_t padded_dim, A factor, A* out) {
  constexpr A kHidden = -std::numeric_limits<A>::infinity();
  A greatest = kHidden, total{0};
  for (int64_t split = 0; split < splits; ++split)
    if (row_sum[split * rows + row] != 0) greatest = std::max(greatest, row_max[split * rows + row]);
  std::fill_n(out, padded_dim, A{0});
  for (int64_t split = 0; split < splits; ++split) {
    const int64_t at = split * rows + row;
    if (row_sum[at] == 0) continue;
    const A weight = std::exp2((row_max[at] - greatest) * factor);
    total += weight * row_sum[at];
    for (int64_t d = 0; d < padded_dim; ++d) out[d] += weight * acc[at * padded_dim + d];
  }
  if (total != 0)
    for (int64_t d = 0; d < padded_dim; ++d) out[d] /= total;
}

template <class A>
void decode_all(const Problem& problem, const Heads& q, const Heads& k, const Heads& v, const Heads& out) {
  const int64_t num_kv_heads = problem.num_kv_heads, groups = problem.groups(), head_dim = problem.head_dim;
  const int64_t padded_dim = round_up(head_dim, kWidth<A>), seqlen_q = problem.sequences[0].seqlen_q, rows = groups * seqlen_q;
  int64_t longest = 0;
  for (const Sequence& sequence : problem.sequences) longest = std::max(longest, sequence.seqlen_k);
  const int64_t splits = std::max<int64_t>(ceil_div(longest, kDecodeSplit), 1);
  const int64_t heads = static_cast<int64_t>(problem.sequences.size()) * num_kv_heads;
  const double flops = 16.0 * count_flops(problem);  // bound by memory, an operation takes the time of many

  Buffer<A> partials;  // [heads][splits][rows][padded_dim], then row_max and row_sum [heads][splits][rows]
  A* acc = partials.at_least(heads * splits * rows * (padded_dim + 2));
  A* row_max = acc + heads * splits * rows * padded_dim;
  A* row_sum = row_max + heads * splits * rows;
  for_each_task(heads * splits, flops, [&](int64_t task) {
    const int64_t head = task / splits, kv_head = head % num_kv_heads, begin = task % splits * kDecodeSplit;
    const Sequence& sequence = problem.sequences[head / num_kv_heads];
    decode_split<A>(problem, sequence, kv_head, begin, std::min(begin + kDecodeSplit, sequence.seqlen_k), q,
                    k.at(sequence.batch, kv_head, 0), v.at(sequence.batch, kv_head, 0), acc + task * rows * padded_dim,
                    row_max + task * rows, row_sum + task * rows);
  });
  const A factor = Scores<A>(problem.options).factor;
  std::vector<A> row_out(padded_dim);
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t r = 0; r < rows; ++r) {
      combine_splits(acc + head * splits * rows * padded_dim, row_max + head * splits * rows, row_sum + head * splits * rows,
                     splits, rows, r, padded_dim, factor, row_out.data());
      const int64_t q_head = head % num_kv_heads * groups + r / seqlen_q;
      write_rows(out.at(head / num_kv_heads, q_head, r % seqlen_q), 1, head_dim, A{1}, row_out.data(), padded_dim);
    }
}

// The ops, as op.py declares them

template <class F>
void in_compute_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Double)
    f(double{});
  else
    f(float{});
}

Problem dense_problem(const Tensor& q, const Tensor& k, const Options& options) {
  Problem problem{q.size(1), k.size(1), q.size(3), options, {}};
  for (int64_t b = 0; b < q.size(0); ++b) problem.sequences.push_back({b, 0, 0, q.size(2), k.size(2)});
  return problem;
}

// Reads the documents' bounds, and checks them: here that costs nothing, and a wrong one would reach foreign memory.
std::vector<std::pair<int64_t, int64_t>> documents(const Tensor& cu_seqlens, int64_t total, int64_t longest, const char* side) {
  const int32_t* bounds = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t count = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(bounds[0] == 0 && bounds[count] == total, "cu_seqlens_", side, ": got ", bounds[0], " to ",
                  bounds[count], ", needs 0 to the ", total, " rows of ", side);
  std::vector<std::pair<int64_t, int64_t>> rows;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = int64_t{bounds[i + 1]} - bounds[i];
    STD_TORCH_CHECK(length >= 0, "cu_seqlens_", side, ": got ", bounds[i], " before ", bounds[i + 1], ", needs rising bounds");
    STD_TORCH_CHECK(length <= longest, "max_seqlen_", side, ": got ", longest, ", but document ", i, " has ", length, " rows");
    rows.emplace_back(bounds[i], length);
  }
  return rows;
}

Problem packed_problem(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                       int64_t max_seqlen_q, int64_t max_seqlen_k, const Options& options) {
  Problem problem{q.size(1), k.size(1), q.size(2), options, {}};
  const auto rows_q = documents(cu_seqlens_q, q.size(0), max_seqlen_q, "q");
  const auto rows_k = documents(cu_seqlens_k, k.size(0), max_seqlen_k, "k");
  for (size_t i = 0; i < rows_q.size(); ++i)
    problem.sequences.push_back({0, rows_q[i].first, rows_k[i].first, rows_q[i].second, rows_k[i].second});
  return problem;
}

std::tuple<Tensor, Tensor> run_forward(const Problem& problem, const Tensor& q, const Tensor& k, const Tensor& v, bool packed) {
  const ScalarType dtype = q.scalar_type();
  const ScalarType lse_dtype = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::empty_like(q);
  Tensor lse = packed ? torch::stable::new_empty(q, {q.size(1), q.size(0)}, lse_dtype)
                      : torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, lse_dtype);
  in_compute_type(dtype, [&](auto zero) {
    forward_all<decltype(zero)>(problem, Heads(q, packed, true), Heads(k, packed, true), Heads(v, packed, true),
                                Heads(out, packed, true), Heads(lse, packed, false));
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> run_backward(const Problem& problem, const Tensor& dout, const std::optional<Tensor>& dlse,
                                                const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                                const Tensor& lse, bool packed) {
  Tensor dq = torch::stable::empty_like(q), dk = torch::stable::empty_like(k), dv = torch::stable::empty_like(v);
  BackwardHeads x{Heads(dout, packed, true), dlse ? Heads(*dlse, packed, false) : Heads(), Heads(q, packed, true),
                  Heads(k, packed, true), Heads(v, packed, true), Heads(out, packed, true), Heads(lse, packed, false),
                  Heads(dq, packed, true), Heads(dk, packed, true), Heads(dv, packed, true), dlse.has_value()};
  in_compute_type(q.scalar_type(), [&](auto zero) { backward_all<decltype(zero)>(problem, x); });
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> flash_attention_forward(Tensor q, Tensor k, Tensor v, double softmax_scale, bool causal,
                                                   int64_t window_size, double softcap) {
  return run_forward(dense_problem(q, k, {softmax_scale, causal, window_size, softcap}), q, k, v, false);
}

std::tuple<Tensor, Tensor, Tensor> flash_attention_backward(Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k,
                                                            Tensor v, Tensor out, Tensor lse, double softmax_scale,
                                                            bool causal, int64_t window_size, double softcap) {
  return run_backward(dense_problem(q, k, {softmax_scale, causal, window_size, softcap}), dout, dlse, q, k, v, out, lse, false);
}

std::tuple<Tensor, Tensor> flash_attention_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,
                                                          Tensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                          double softmax_scale, bool causal, int64_t window_size, double softcap) {
  const Options options{softmax_scale, causal, window_size, softcap};
  return run_forward(packed_problem(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options), q, k, v, true);
}

std::tuple<Tensor, Tensor, Tensor> flash_attention_varlen_backward(
    Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q,
    Tensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool causal, int64_t window_size,
    double softcap) {
  const Options options{softmax_scale, causal, window_size, softcap};
  const Problem problem = packed_problem(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options);
  return run_backward(problem, dout, dlse, q, k, v, out, lse, true);
}

Tensor decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, double softmax_scale,
                        int64_t window_size, double softcap) {
  Problem problem{q.size(1), k_cache.size(1), q.size(3), {softmax_scale, true, window_size, softcap}, {}};
  const int32_t* seqlens = static_cast<const int32_t*>(cache_seqlens.const_data_ptr());
  for (int64_t b = 0; b < q.size(0); ++b) {
    STD_TORCH_CHECK(seqlens[b] >= 0 && seqlens[b] <= k_cache.size(2), "cache_seqlens: got ", seqlens[b], " for sequence ", b,
                    ", allowed are 0 to the capacity ", k_cache.size(2));
    problem.sequences.push_back({b, 0, 0, q.size(2), seqlens[b]});
  }
  if (q.numel() == 0) return torch::stable::empty_like(q);
  if (problem.groups() * q.size(2) > kDecodeRows) return std::get<0>(run_forward(problem, q, k_cache, v_cache, false));
  Tensor out = torch::stable::empty_like(q);
  in_compute_type(q.scalar_type(), [&](auto zero) {
    decode_all<decltype(zero)>(problem, Heads(q, false, true), Heads(k_cache, false, true), Heads(v_cache, false, true),
                               Heads(out, false, true));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kernels, CPU, m) {
  m.impl("flash_attention_forward", TORCH_BOX(&flash_attention_forward));
  m.impl("flash_attention_backward", TORCH_BOX(&flash_attention_backward));
  m.impl("flash_attention_varlen_forward", TORCH_BOX(&flash_attention_varlen_forward));
  m.impl("flash_attention_varlen_backward", TORCH_BOX(&flash_attention_varlen_backward));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}
