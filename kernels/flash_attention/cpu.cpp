// FlashAttention-2 on the CPU: forward, backward, packed documents and decoding over a cache.
//
//   S = softmax_scale Q K^T    P = softmax(S)    O = P V    lse = log(sum exp S)
//
//   dV = P^T dO    dP = dO V^T    delta = rowsum(dO * O) - dlse    dS = P * (dP - delta)
//   dQ = softmax_scale dS K    dK = softmax_scale dS^T Q
//
// Everything is computed transposed, S^T = K Q^T and O^T = V^T P^T, with the queries of a block side by side in vector
// lanes: row_max, row_sum and the rescaling are then plain vector arithmetic, and K and V are read one element at a
// time (broadcast), so that they need no packing. In bf16 pairs (microkernels.h) V is packed once for all queries.
//
//               kBlockM queries (lanes)            Forward, one task: one Q block of one head. Loops over K, V blocks.
//               +-----------------+                Backward, one task: one key head, or a share of its query blocks.
//               |  Q^T [D, M]     |                Loops over chunks of queries, then K, V blocks, then Q blocks.
//   K, V        +-----------------+
//   +--------+  +-----------------+
//   | [N, D] |  | S^T, P^T [N, M] |                O^T [D, M] += V^T P^T
//   +--------+  +-----------------+                dK, dV [N, D] += dS^T Q, P^T dO    dQ^T [D, M] += K^T dS^T
//
// FlashAttention-2 (arXiv:2307.08691). Forward: algorithm 1, lines 6 to 11 in the loop of forward_block, 12 and 13 in
// OnlineSoftmax::finish. Backward: algorithm 2, line 4 in read_row_statistics, 5 to 19 in the loops of backward_chunk.
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

constexpr int64_t kMaxHeadDim = 256;
constexpr double kParallelFlops = 2e6;  // less work than this is done before other threads have woken
constexpr int64_t kBlockN = 64;         // keys in a block
constexpr int64_t kChunk = 512;         // queries whose gradients stay in the cache while the keys pass by
constexpr int64_t kBackwardTasks = 16;  // the backward pass is cut into at least so many, where it is long enough
constexpr int64_t kDecodeSplit = 512;   // keys of one decoding task
constexpr int64_t kFarBytes = int64_t{16} << 20;  // caches larger than this in all come from memory
constexpr int64_t kDecodeRows = 16;     // more query rows than this per key head are no longer decoding
constexpr int64_t kKeptBytes = int64_t{64} << 20;  // a buffer larger than this is given back after the call

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Element types

#if defined(__aarch64__)
using Half = __fp16;
#elif defined(__x86_64__) && defined(__FLT16_MANT_DIG__)
using Half = _Float16;
#else
using Half = torch::headeronly::Half;
#endif

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

// Calls f with a value of the type that a dtype names; only with types that are computed in A.
template <class A, class F>
void visit(ScalarType dtype, const F& f) {
  if constexpr (std::is_same_v<A, double>)
    return f(double{});
  else if (dtype == ScalarType::Float)
    return f(float{});
  else if (dtype == ScalarType::Half)
    return f(Half{});
  else
    return f(BFloat16{});
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
  TOY_LM_NOINLINE Heads(const Tensor& x, bool packed, bool has_dim) {
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

  int64_t key_begin(int64_t i) const { return window ? std::clamp<int64_t>(i + offset - window + 1, 0, seqlen_k) : 0; }
  int64_t key_end(int64_t i) const {
    if (causal) return std::clamp<int64_t>(i + offset + 1, 0, seqlen_k);
    return window ? std::clamp<int64_t>(i + offset + window, 0, seqlen_k) : seqlen_k;
  }

  // Of the queries [row_begin, row_end), those that see any of the keys [first, last): [begin, end), from row_begin on.
  std::pair<int64_t, int64_t> queries(int64_t first, int64_t last, int64_t row_begin, int64_t row_end) const {
    const int64_t rows = row_end - row_begin, begin = first - offset - row_begin, end = last - offset - row_begin;
    return {causal   ? std::clamp<int64_t>(begin, 0, rows)
            : window ? std::clamp<int64_t>(begin - window + 1, 0, rows)
                     : 0,
            window ? std::clamp<int64_t>(end - 1 + window, 0, rows) : rows};
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

  void release_if_large() {
    if (size_ * static_cast<int64_t>(sizeof(A)) <= kKeptBytes) return;
    data_.reset();
    size_ = 0;
  }

 private:
  struct Free {
    void operator()(A* p) const { std::free(p); }
  };
  std::unique_ptr<A, Free> data_;
  int64_t size_ = 0;
};

// Copies between tensors and blocks

// Are rows of a tensor elements A side by side, and whole vectors of them?
template <class A>
bool holds(const Matrix& matrix) {
  return matrix.dtype == (sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float) && matrix.dim_stride == 1;
}
template <class A>
bool holds_vectors(const Matrix& matrix, int64_t dims) {
  return holds<A>(matrix) && dims % kWidth<A> == 0;
}

// block [padded_rows][block_row] = matrix[0:rows, 0:dims], zero beyond
template <class A>
TOY_LM_NOINLINE void read_rows(const Matrix& matrix, int64_t rows, int64_t dims, A* block, int64_t block_row,
                               int64_t padded_rows) {
  visit<A>(matrix.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < rows; ++i) {
      const T* __restrict row = matrix.row<T>(i);
      A* __restrict to = block + i * block_row;
      if (matrix.dim_stride == 1)
        for (int64_t d = 0; d < dims; ++d) to[d] = widen<A>(row[d]);
      else
        for (int64_t d = 0; d < dims; ++d) to[d] = widen<A>(row[d * matrix.dim_stride]);
      std::fill(to + dims, to + block_row, A{0});
    }
  });
  std::fill(block + rows * block_row, block + padded_rows * block_row, A{0});
}

// matrix[0:rows, 0:dims] = factor * block, block [rows][block_row]
template <class A>
TOY_LM_NOINLINE void write_rows(const Matrix& matrix, int64_t rows, int64_t dims, A factor, const A* block,
                                int64_t block_row) {
  visit<A>(matrix.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < rows; ++i) {
      T* __restrict row = matrix.row<T>(i);
      const A* __restrict from = block + i * block_row;
#if defined(TOY_LM_BF16_PAIRS)
      if constexpr (std::is_same_v<T, BFloat16>)
        if (matrix.dim_stride == 1 && dims % kWidth<A> == 0) {
          for (int64_t d = 0; d < dims; d += kWidth<A>) store_rounded(row + d, load(from + d) * factor);
          continue;
        }
#endif
      if (matrix.dim_stride == 1)
        for (int64_t d = 0; d < dims; ++d) row[d] = narrow<T>(factor * from[d]);
      else
        for (int64_t d = 0; d < dims; ++d) row[d * matrix.dim_stride] = narrow<T>(factor * from[d]);
    }
  });
}

// matrix[0:rows, 0:dims] = block^T, block [dims][kBlockM]
template <int64_t kBlockM, class A>
TOY_LM_NOINLINE void write_transposed(const Matrix& matrix, int64_t rows, int64_t dims, const A* block) {
  if (holds_vectors<A>(matrix, dims)) return transpose(block, kBlockM, dims, rows, matrix.row<A>(0), matrix.row_stride);
  alignas(64) A staged[kBlockM * kMaxHeadDim];  // [rows][staged_row]
  const int64_t staged_row = round_up(dims, kWidth<A>);
  transpose(block, kBlockM, dims, rows, staged, staged_row);
  write_rows(matrix, rows, dims, A{1}, staged, staged_row);
}

// Operands of the products, from tensors. "Left" ones are K and V, "right" ones Q and dO; see microkernels.h.

template <class M>
struct Operands;

template <class A>
struct Operands<Plain<A>> {
  using E = A;
  static constexpr int64_t kBlockM = Plain<A>::kBlockM;

  static int64_t padded_dim(int64_t head_dim) { return round_up(head_dim, kWidth<A>); }

  // Can a block of keys be used where it lies, seen as rows or as columns? Not if its rows are far apart, because these
  // would share few of the cache's sets.
  static bool rows_fit(const Matrix& matrix, int64_t, int64_t) { return columns_fit(matrix); }
  static bool columns_fit(const Matrix& matrix) { return holds<A>(matrix) && matrix.row_stride <= kMaxHeadDim; }
  static Left<E> rows_in_place(const Matrix& block) { return {block.row<A>(0), block.row_stride, 1}; }
  static Left<E> columns_in_place(const Matrix& block) { return {block.row<A>(0), 1, block.row_stride}; }

  // left [keys][head_dim], and the same seen as its transpose
  TOY_LM_NOINLINE static void pack_rows(const Matrix& block, int64_t keys, int64_t head_dim, E* to) {
    read_rows(block, keys, head_dim, to, head_dim, keys);
  }
  static Left<E> packed_rows(const E* packed, int64_t head_dim) { return {packed, head_dim, 1}; }
  TOY_LM_NOINLINE static void pack_columns(const Matrix& block, int64_t keys, int64_t head_dim, E* to) {
    pack_rows(block, keys, head_dim, to);
  }
  static Left<E> packed_columns(const E* packed, int64_t head_dim) { return {packed, 1, head_dim}; }

  // right [head_dim][kBlockM] = sign * block^T
  TOY_LM_NOINLINE static void right_columns(const Matrix& block, int64_t rows, int64_t head_dim, bool negate, E* to) {
    alignas(64) A staged[kBlockM * kMaxHeadDim];
    const A* from = staged;
    int64_t from_row = head_dim;
    if (holds<A>(block)) {
      from = block.row<A>(0);
      from_row = block.row_stride;
    } else {
      read_rows(block, rows, head_dim, staged, head_dim, rows);
    }
    transpose(from, from_row, rows, head_dim, to, kBlockM);
    if (negate)
      for (int64_t i = 0; i < head_dim * kBlockM; ++i) to[i] = -to[i];
  }

  // Rows of queries as a right operand [rows][padded_dim], where they lie
  static bool right_in_place(const Matrix& matrix, int64_t head_dim) {
    return columns_fit(matrix) && holds_vectors<A>(matrix, head_dim);
  }

  // right [kBlockM][padded_dim] = block
  TOY_LM_NOINLINE static void right_rows(const Matrix& block, int64_t rows, int64_t head_dim, E* to) {
    read_rows(block, rows, head_dim, to, padded_dim(head_dim), kBlockM);
  }

  // Two rows of weights as rows n and n + 1 of a right operand [kBlockN][kBlockM], or of a left one
  static void store_right(E* to, int64_t n, int64_t m, Vec<A> x, Vec<A> y) {
    store(to + n * kBlockM + m, x);
    store(to + (n + 1) * kBlockM + m, y);
  }
  static void store_left(E* to, int64_t n, int64_t m, Vec<A> x, Vec<A> y) { store_right(to, n, m, x, y); }
  static constexpr bool kOneLayout = true;  // a right operand [keys][kBlockM] is a left operand too, as it stands
};

#if defined(TOY_LM_BF16_PAIRS)
template <int64_t kBlockM>
struct Operands<Bf16Pairs<kBlockM>> {
  using E = BFloat16;

  static int64_t padded_dim(int64_t head_dim) { return round_up(head_dim, Bf16PairProducts::kDepthUnit); }

  // Only whole blocks can be used where they lie, seen as rows.
  static bool rows_fit(const Matrix& matrix, int64_t keys, int64_t head_dim) {
    return keys >= kBlockN && matrix.dim_stride == 1 && matrix.row_stride <= kMaxHeadDim &&
           head_dim == padded_dim(head_dim);
  }
  static bool columns_fit(const Matrix&) { return false; }
  static Left<E> rows_in_place(const Matrix& block) { return {block.row<E>(0), block.row_stride, 1}; }
  static Left<E> columns_in_place(const Matrix& block) { return rows_in_place(block); }

  // bf16 [padded_rows][to_row] = block[0:rows, 0:head_dim], zero beyond
  static void copy(const Matrix& block, int64_t rows, int64_t head_dim, E* to, int64_t to_row, int64_t padded_rows) {
    for (int64_t i = 0; i < rows; ++i, to += to_row) {
      const E* row = block.row<E>(i);
      if (block.dim_stride == 1)
        std::memcpy(to, row, head_dim * sizeof(E));
      else
        for (int64_t d = 0; d < head_dim; ++d) to[d] = row[d * block.dim_stride];
      std::fill(to + head_dim, to + to_row, E{0});
    }
    std::fill_n(to, (padded_rows - rows) * to_row, E{0});
  }

  // left [kBlockN][padded_dim]
  TOY_LM_NOINLINE static void pack_rows(const Matrix& block, int64_t keys, int64_t head_dim, E* to) {
    copy(block, keys, head_dim, to, padded_dim(head_dim), kBlockN);
  }
  static Left<E> packed_rows(const E* packed, int64_t head_dim) { return {packed, padded_dim(head_dim), 1}; }

  // left [padded_dim][kBlockN]: the rows of two keys become pairs, and the pairs change places as 32-bit numbers.
  TOY_LM_NOINLINE static void pack_columns(const Matrix& block, int64_t keys, int64_t head_dim, E* to) {
    alignas(64) uint32_t pairs[kBlockN / 2 * kMaxHeadDim];
    pair_rows(block, keys, head_dim, pairs, kBlockN);
    transpose(pairs, padded_dim(head_dim), kBlockN / 2, padded_dim(head_dim), reinterpret_cast<uint32_t*>(to),
              kBlockN / 2);
  }
  static Left<E> packed_columns(const E* packed, int64_t) { return {packed, kBlockN, 1}; }

  // pairs [padded_rows / 2][padded_dim]: rows 2 i (lower halves) and 2 i + 1 (upper halves)
  TOY_LM_NOINLINE static void pair_rows(const Matrix& block, int64_t rows, int64_t head_dim, uint32_t* pairs,
                                        int64_t padded_rows) {
    const int64_t width = padded_dim(head_dim);
    alignas(64) static constexpr E kZeros[kMaxHeadDim] = {};
    for (int64_t i = 0; i < padded_rows; i += 2, pairs += width) {
      const E* low = i < rows ? block.row<E>(i) : kZeros;
      const E* high = i + 1 < rows ? block.row<E>(i + 1) : kZeros;
      if (block.dim_stride == 1) {
        uint32_t* __restrict to = pairs;
        for (int64_t d = 0; d < head_dim; ++d) to[d] = low[d].bits | static_cast<uint32_t>(high[d].bits) << 16;
      } else {
        const int64_t low_stride = i < rows ? block.dim_stride : 1, high_stride = i + 1 < rows ? block.dim_stride : 1;
        for (int64_t d = 0; d < head_dim; ++d)
          pairs[d] = low[d * low_stride].bits | static_cast<uint32_t>(high[d * high_stride].bits) << 16;
      }
      std::fill(pairs + head_dim, pairs + width, 0u);
    }
  }

  // right [padded_dim / 2][kBlockM][2] = sign * block^T
  TOY_LM_NOINLINE static void right_columns(const Matrix& block, int64_t rows, int64_t head_dim, bool negate, E* to) {
    alignas(64) E staged[kBlockM * kMaxHeadDim];
    const int64_t width = padded_dim(head_dim);
    uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
    const E* from = staged;
    int64_t from_row = width;
    if (rows == kBlockM && head_dim == width && block.dim_stride == 1 && block.row_stride % 2 == 0) {
      from = block.row<E>(0);
      from_row = block.row_stride;
    } else {
      copy(block, rows, head_dim, staged, width, kBlockM);
    }
    transpose(reinterpret_cast<const uint32_t*>(from), from_row / 2, kBlockM, width / 2, pairs, kBlockM);
    if (negate)
      for (int64_t i = 0; i < width / 2 * kBlockM; ++i) pairs[i] ^= 0x80008000u;
  }

  static bool right_in_place(const Matrix&, int64_t) { return false; }

  // right [kBlockM / 2][padded_dim][2] = block
  TOY_LM_NOINLINE static void right_rows(const Matrix& block, int64_t rows, int64_t head_dim, E* to) {
    pair_rows(block, rows, head_dim, reinterpret_cast<uint32_t*>(to), kBlockM);
  }

  static void store_right(E* to, int64_t n, int64_t m, Vec<float> x, Vec<float> y) {
    store(reinterpret_cast<uint32_t*>(to + n * kBlockM) + m, to_pairs(x, y));
  }
  static void store_left(E* to, int64_t n, int64_t m, Vec<float> x, Vec<float> y) {
    store_rounded(to + n * kBlockM + m, x);
    store_rounded(to + (n + 1) * kBlockM + m, y);
  }
  static constexpr bool kOneLayout = false;
};
#endif

// K or V of one key head as left operands, block of keys after block of keys: where they lie, or packed.
template <class M>
struct KeyBlocks {
  using E = typename M::Element;
  Matrix matrix;
  int64_t seqlen_k, head_dim;
  const E* packed = nullptr;  // all blocks, if they were packed before

  static int64_t block_size(int64_t head_dim) { return kBlockN * Operands<M>::padded_dim(head_dim); }

  TOY_LM_NOINLINE Left<E> rows(int64_t n, Buffer<E>& scratch) const {
    if (packed) return Operands<M>::packed_rows(packed + n / kBlockN * block_size(head_dim), head_dim);
    if (Operands<M>::rows_fit(matrix, seqlen_k - n, head_dim)) return Operands<M>::rows_in_place(matrix.from(n));
    E* block = scratch.at_least(block_size(head_dim));
    Operands<M>::pack_rows(matrix.from(n), std::min(kBlockN, seqlen_k - n), head_dim, block);
    return Operands<M>::packed_rows(block, head_dim);
  }

  TOY_LM_NOINLINE Left<E> columns(int64_t n, Buffer<E>& scratch) const {
    if (packed) return Operands<M>::packed_columns(packed + n / kBlockN * block_size(head_dim), head_dim);
    if (Operands<M>::columns_fit(matrix)) return Operands<M>::columns_in_place(matrix.from(n));
    E* block = scratch.at_least(block_size(head_dim));
    Operands<M>::pack_columns(matrix.from(n), std::min(kBlockN, seqlen_k - n), head_dim, block);
    return Operands<M>::packed_columns(block, head_dim);
  }
};

// Tasks

// Runs f(task) for every task on torch's threads. Each begins with a share of its own, the same in every call, so that
// it finds in its cache what it read before; then it helps the others.
template <class F>
void for_each_task(int64_t tasks, double flops, const F& f) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (threads <= 1 || flops < kParallelFlops) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const std::unique_ptr<Share[]> shares(new Share[threads]);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next = tasks * i / threads;
    shares[i].end = tasks * (i + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = 0; i < threads; ++i) {
        Share& share = shares[(thread + i) % threads];
        for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) f(task);
      }
  });
}

// Stages that forward and backward share

// How a raw score becomes one: exp2(factor * s) is its weight. The sign of softmax_scale is put into Q^T, so that the
// greatest raw score is the greatest score; factor is above 0, so that -inf * factor is -inf.
template <class A>
struct Scores {
  bool negate, capped;
  A factor, before_cap;

  TOY_LM_NOINLINE explicit Scores(const Options& options)
      : negate(options.softmax_scale < 0), capped(options.softcap > 0) {
    const double scale = std::abs(options.softmax_scale);
    factor =
        std::max<A>(static_cast<A>((capped ? options.softcap : scale) * kLog2E), std::numeric_limits<float>::min());
    before_cap = capped ? static_cast<A>(scale / options.softcap) : A{0};
  }
};

// s = tanh(scale s / softcap), which `factor` multiplies by softcap. s [keys][kBlockM]
template <int64_t kBlockM, class A>
TOY_LM_NOINLINE void soft_cap(A* s, int64_t keys, int64_t columns, A before_cap) {
  for (int64_t n = 0; n < keys; ++n)
    for (int64_t j = 0; j < columns; j += kWidth<A>) {
      A* at = s + n * kBlockM + j;
      store(at, tanh(load(at) * before_cap));
    }
}

// Does some query of [row_begin, row_end) not see some key of [key_begin, key_end)?
bool needs_mask(const Visible& visible, int64_t row_begin, int64_t row_end, int64_t key_begin, int64_t key_end) {
  return visible.key_begin(row_end - 1) > key_begin || visible.key_end(row_begin) < key_end;
}

// s [keys][kBlockM] = left right, where left [keys][depth] is K or V and right [depth][kBlockM] the queries
// [row_begin, row_end) or their dO. In a masked tile each group of keys takes only the queries that see some of it.
template <class M>
TOY_LM_NOINLINE void multiply_tile(const Visible& visible, bool masked, int64_t row_begin, int64_t row_end,
                                   int64_t key_begin, int64_t keys, int64_t columns, int64_t depth,
                                   const Left<typename M::Element>& left, const typename M::Element* right,
                                   typename M::Accumulator* s) {
  constexpr int64_t kBlockM = M::kBlockM;
  const int64_t group = masked ? M::kMaskedColumns : keys;
  for (int64_t n = 0; n < keys; n += group) {
    const int64_t rows = std::min(group, keys - n);
    auto [first, last] = visible.queries(key_begin + n, key_begin + n + rows, row_begin, row_end);
    if (last <= first) continue;
    first = masked ? first / group * group : 0;
    last = masked ? std::min(round_up(last, group), columns) : columns;
    M::multiply(round_up(rows, M::kRowUnit), last - first, depth, left.from_row(n), right + first * M::kPairing,
                kBlockM, s + n * kBlockM + first, kBlockM, true);
  }
}

// s = -inf where the query does not see the key, and in lanes that hold no query. s [keys][kBlockM]
template <int64_t kBlockM, class A>
TOY_LM_NOINLINE void mask(const Visible& visible, int64_t row_begin, int64_t rows, int64_t key_begin, int64_t keys,
                          int64_t columns, A* s) {
  constexpr int W = kWidth<A>;
  // Lane m sees the keys first + m <= n < last + m of this tile. Further off than a tile is as good as a tile off.
  const auto near = [&](int64_t x) {
    return static_cast<A>(std::clamp<int64_t>(x, -2 * (kBlockM + kBlockN), 2 * (kBlockM + kBlockN)));
  };
  const bool windowed = visible.window > 0;
  const int64_t position = row_begin + visible.offset - key_begin;
  const A first = near(windowed ? position - visible.window + 1 : std::numeric_limits<int32_t>::min());
  const A last = near(visible.causal ? position + 1
                      : windowed     ? position + visible.window
                                     : std::numeric_limits<int32_t>::max());
  const Vec<A> hidden = broadcast(-std::numeric_limits<A>::infinity());
  // All queries see the keys from `seen` to `seen_end`, unless some lanes hold no query.
  const int64_t seen = rows < columns ? keys : visible.key_begin(row_begin + rows - 1) - key_begin;
  const int64_t seen_end = visible.key_end(row_begin) - key_begin;
  Vec<A> lane{};
  for (int i = 0; i < W; ++i) lane[i] = static_cast<A>(i);
  for (int64_t j = 0; j < columns; j += W, lane += static_cast<A>(W)) {
    const Vec<A> begin = select<A>(lane < static_cast<A>(rows), lane + first, broadcast(static_cast<A>(kBlockN)));
    const Vec<A> end = lane + last;
    for (int64_t n = 0; n < keys; ++n) {
      if (n >= seen && n < seen_end) n = seen_end;
      if (n >= keys) break;
      const Vec<A> key = broadcast(static_cast<A>(n));
      A* at = s + n * kBlockM + j;
      store(at, select<A>((begin <= key) & (key < end), load(at), hidden));
    }
  }
}

// Rows up to the next whole unit of keys, which hold no key. At least up to an even number, for pairs.
template <class M>
int64_t hide_padding(typename M::Accumulator* s, int64_t keys, int64_t columns) {
  constexpr int64_t kBlockM = M::kBlockM;
  using A = typename M::Accumulator;
  const int64_t padded = round_up(keys, std::max<int64_t>(M::kDepthUnit, 2));
  for (int64_t n = keys; n < padded; ++n) std::fill_n(s + n * kBlockM, columns, -std::numeric_limits<A>::infinity());
  return padded;
}

// Forward

template <class M>
struct ForwardBuffers {
  Buffer<typename M::Element> q_t, k, v, p;
  Buffer<typename M::Accumulator> s, acc;
};

// The running maximum and sum of each query of a block, and what older results are to be multiplied by.
template <class M>
struct OnlineSoftmax {
  using A = typename M::Accumulator;
  static constexpr int64_t kBlockM = M::kBlockM;
  static constexpr A kHidden = -std::numeric_limits<A>::infinity();
  static constexpr A kSlack = 8;  // a maximum may be exceeded by a factor of 2^8 before it is replaced
  alignas(64) A row_max[kBlockM], row_sum[kBlockM], alpha[kBlockM];

  OnlineSoftmax() {
    std::fill_n(row_max, kBlockM, kHidden);
    std::fill_n(row_sum, kBlockM, A{0});
  }

  // p = exp(s - row_max) for some columns of s [keys][kBlockM], where keys is even. Returns whether older results need
  // rescaling. row_max follows the greatest score only when that is far ahead (as in FlashAttention-4): the result is
  // the same, and most tiles need no rescaling. -inf - (-inf) is kept from happening here alone: a row that has seen no
  // key takes 0 for its maximum, so that its weights are exp2(-inf) = 0.
  TOY_LM_NOINLINE bool update(const A* s, int64_t keys, int64_t first_column, int64_t columns, A factor,
                              typename M::Element* p) {
    constexpr int W = kWidth<A>;
    bool rescale = false;
    for (int64_t j = first_column; j < first_column + columns; j += W) {
      const Vec<A> old_max = load(row_max + j);
      Vec<A> most[4] = {old_max, old_max, old_max, old_max};  // each waits for the one before, so four at a time
      int64_t at = 0;
      for (; at + 4 <= keys; at += 4)
        for (int i = 0; i < 4; ++i) most[i] = max<A>(load(s + (at + i) * kBlockM + j), most[i]);
      for (; at < keys; ++at) most[0] = max<A>(load(s + at * kBlockM + j), most[0]);
      Vec<A> new_max = max<A>(max<A>(most[0], most[1]), max<A>(most[2], most[3]));
      new_max = select<A>((new_max - old_max) * factor > kSlack, new_max, old_max);
      const Vec<A> shift = select<A>(new_max == kHidden, Vec<A>{}, new_max * factor);
      Vec<A> even_sum{}, odd_sum{};
      for (int64_t n = 0; n < keys; n += 2) {
        const Vec<A> even = M::weight(load(s + n * kBlockM + j) * factor - shift);
        const Vec<A> odd = M::weight(load(s + (n + 1) * kBlockM + j) * factor - shift);
        Operands<M>::store_right(p, n, j, even, odd);
        even_sum += even;
        odd_sum += odd;
      }
      const Vec<A> factor_old = exp2(old_max * factor - shift);
      rescale |= any<A>(new_max != old_max);
      store(alpha + j, factor_old);
      store(row_max + j, new_max);
      store(row_sum + j, load(row_sum + j) * factor_old + (even_sum + odd_sum));
    }
    return rescale;
  }

  // Divides by the sums at last. lse in natural logarithms; in fp64 up to its end, because the backward pass takes
  // every weight from it.
  TOY_LM_NOINLINE void finish(int64_t rows, A factor, A* acc, int64_t head_dim, const Matrix& lse) {
    constexpr int W = kWidth<A>;
    alignas(64) A logs[kBlockM];
    const int64_t columns = round_up(rows, W);
    for (int64_t j = 0; j < columns; j += W) {
      const Vec<A> sum = load(row_sum + j);
      store(alpha + j, select<A>(sum == A{0}, Vec<A>{}, A{1} / sum));
      store(logs + j, log(sum));
    }
    scale_columns(acc, head_dim, 0, columns);
    const double natural = static_cast<double>(factor) * kLn2;
    for (int64_t m = 0; m < rows; ++m)
      *lse.row<A>(m) = row_sum[m] == 0
                           ? kHidden
                           : static_cast<A>(static_cast<double>(row_max[m]) * natural + static_cast<double>(logs[m]));
  }

  // acc [head_dim][kBlockM] *= alpha
  TOY_LM_NOINLINE void scale_columns(A* acc, int64_t head_dim, int64_t first_column, int64_t columns) const {
    for (int64_t d = 0; d < head_dim; ++d)
      for (int64_t j = first_column; j < first_column + columns; j += kWidth<A>)
        store(acc + d * kBlockM + j, load(acc + d * kBlockM + j) * load(alpha + j));
  }
};

// out and lse of one block of queries of one head.
template <class M>
void forward_block(const Problem& problem, const Sequence& sequence, int64_t row_begin, const Matrix& q,
                   const KeyBlocks<M>& k, const KeyBlocks<M>& v, const Matrix& out, const Matrix& lse) {
  constexpr int64_t kBlockM = M::kBlockM;
  using A = typename M::Accumulator;
  thread_local ForwardBuffers<M> buffers;
  [[maybe_unused]] const typename M::Session session;
  const int64_t head_dim = problem.head_dim, padded_dim = Operands<M>::padded_dim(head_dim);
  const int64_t rows = std::min(kBlockM, sequence.seqlen_q - row_begin);
  const Visible visible(problem.options, sequence);
  const Scores<A> scores(problem.options);

  auto* q_t = buffers.q_t.at_least(padded_dim * kBlockM);  // right [head_dim][kBlockM]
  A* s = buffers.s.at_least(kBlockN * kBlockM);            // S^T [kBlockN][kBlockM]
  A* acc = buffers.acc.at_least(padded_dim * kBlockM);     // O^T [head_dim][kBlockM]
  typename M::Element* p;                                  // P^T [kBlockN][kBlockM], right
  if constexpr (Operands<M>::kOneLayout)
    p = s;
  else
    p = buffers.p.at_least(kBlockN * kBlockM);
  Operands<M>::right_columns(q, rows, head_dim, scores.negate, q_t);
  OnlineSoftmax<M> softmax;

  // Which parts of acc's columns hold nothing yet.
  constexpr int64_t kPart = M::kMaskedColumns, kParts = kBlockM / kPart;
  bool fresh[kParts];
  std::fill_n(fresh, kParts, true);
  const auto clear = [&] {
    for (int64_t part = 0; part < kParts; ++part) {
      for (int64_t d = 0; d < padded_dim && fresh[part]; ++d)
        std::fill_n(acc + d * kBlockM + part * kPart, kPart, A{0});
      fresh[part] = false;
    }
  };
  const int64_t depth = round_up(head_dim, M::kDepthUnit), acc_rows = round_up(head_dim, M::kRowUnit);
  const int64_t row_end = row_begin + rows, all_columns = round_up(rows, kWidth<A>);
  const int64_t keys_begin = visible.key_begin(row_begin) / kBlockN * kBlockN, keys_end = visible.key_end(row_end - 1);
  for (int64_t n = keys_begin; n < keys_end; n += kBlockN) {
    const Left<typename M::Element> k_block = k.rows(n, buffers.k), v_block = v.columns(n, buffers.v);
    const int64_t block_keys = std::min(kBlockN, keys_end - n);
    const bool masked = needs_mask(visible, row_begin, row_end, n, n + block_keys);

    // S^T = K Q^T
    multiply_tile<M>(visible, masked, row_begin, row_end, n, block_keys, all_columns, depth, k_block, q_t, s);

    // A masked tile is taken in parts, each with the keys that its own queries see.
    const int64_t step = masked ? kPart : kBlockM;
    if (!masked && std::find(fresh, fresh + kParts, false) != fresh + kParts) clear();
    for (int64_t m = 0; m < rows; m += step) {
      const int64_t part = std::min(step, rows - m), columns = round_up(part, kWidth<A>), row = row_begin + m;
      const int64_t keys = std::min(n + kBlockN, visible.key_end(row + part - 1)) - n;
      if (keys <= 0) continue;

      // Mask
      if (scores.capped) soft_cap<kBlockM>(s + m, keys, columns, scores.before_cap);
      if (masked) mask<kBlockM>(visible, row, part, n, keys, columns, s + m);

      // Online softmax
      const int64_t padded_keys = hide_padding<M>(s + m, keys, columns);
      const bool rescale = softmax.update(s, padded_keys, m, columns, scores.factor, p);

      // Rescale
      const bool first = fresh[m / kPart];
      if (rescale && !first) softmax.scale_columns(acc, head_dim, m, columns);

      // O^T += V^T P^T
      M::multiply(acc_rows, columns, round_up(keys, M::kDepthUnit), v_block, p + m * M::kPairing, kBlockM, acc + m,
                  kBlockM, first);
      std::fill_n(fresh + m / kPart, step / kPart, false);
    }
  }
  clear();

  // O = O / row_sum
  softmax.finish(rows, scores.factor, acc, head_dim, lse);
  write_transposed<kBlockM>(out, rows, head_dim, acc);
}

// Where each sequence's blocks of queries (or keys) start in one long list of them.
std::vector<int64_t> count_blocks(const std::vector<Sequence>& sequences, int64_t Sequence::*seqlen, int64_t block) {
  std::vector<int64_t> starts{0};
  for (const Sequence& sequence : sequences) starts.push_back(starts.back() + ceil_div(sequence.*seqlen, block));
  return starts;
}

int64_t sequence_of_block(const std::vector<int64_t>& starts, int64_t block) {
  return std::upper_bound(starts.begin(), starts.end(), block) - starts.begin() - 1;
}

double count_flops(const Problem& problem) {
  double pairs = 0;
  for (const Sequence& sequence : problem.sequences)
    pairs += static_cast<double>(sequence.seqlen_q) * static_cast<double>(sequence.seqlen_k);
  return 4.0 * pairs * static_cast<double>(problem.num_heads * problem.head_dim) * (problem.options.causal ? 0.5 : 1.0);
}

// Packs K or V of all key heads, block by block, if more than two blocks of queries use it.
template <class M, class Pack>
const typename M::Element* pack_keys(const Problem& problem, const Heads& keys, Buffer<typename M::Element>& buffer,
                                     const Pack& pack) {
  constexpr int64_t kBlockM = M::kBlockM;
  int64_t most_blocks = 0;
  for (const Sequence& sequence : problem.sequences)
    most_blocks = std::max(most_blocks, ceil_div(sequence.seqlen_q, kBlockM));
  if (most_blocks * problem.groups() <= 2) return nullptr;
  const std::vector<int64_t> starts = count_blocks(problem.sequences, &Sequence::seqlen_k, kBlockN);
  const int64_t size = KeyBlocks<M>::block_size(problem.head_dim);
  typename M::Element* packed = buffer.at_least(starts.back() * problem.num_kv_heads * size);
  for_each_task(starts.back() * problem.num_kv_heads, count_flops(problem), [&](int64_t task) {
    const int64_t kv_head = task % problem.num_kv_heads, block = task / problem.num_kv_heads;
    const int64_t index = sequence_of_block(starts, block);
    const Sequence& sequence = problem.sequences[index];
    const int64_t n = (block - starts[index]) * kBlockN;
    // A sequence's blocks lie head after head.
    const int64_t blocks = starts[index + 1] - starts[index];
    typename M::Element* to = packed + ((starts[index] * problem.num_kv_heads) + kv_head * blocks + n / kBlockN) * size;
    pack(keys.at(sequence.batch, kv_head, sequence.k_row + n), std::min(kBlockN, sequence.seqlen_k - n),
         problem.head_dim, to);
  });
  return packed;
}

template <class M>
void forward_all(const Problem& problem, const Heads& q, const Heads& k, const Heads& v, const Heads& out,
                 const Heads& lse) {
  constexpr int64_t kBlockM = M::kBlockM;
  using E = typename M::Element;
  thread_local Buffer<E> k_buffer, v_buffer;
  const E *k_packed = nullptr, *v_packed = nullptr;
  if (!Operands<M>::rows_fit(k.first, kBlockN, problem.head_dim))
    k_packed = pack_keys<M>(problem, k, k_buffer, &Operands<M>::pack_rows);
  if (!Operands<M>::columns_fit(v.first)) v_packed = pack_keys<M>(problem, v, v_buffer, &Operands<M>::pack_columns);
  const std::vector<int64_t> starts = count_blocks(problem.sequences, &Sequence::seqlen_q, kBlockM);
  const std::vector<int64_t> key_starts = count_blocks(problem.sequences, &Sequence::seqlen_k, kBlockN);
  const int64_t blocks = starts.back(), head_dim = problem.head_dim, size = KeyBlocks<M>::block_size(head_dim);
  for_each_task(blocks * problem.num_heads, count_flops(problem), [&](int64_t task) {
    // Head after head, so that its keys stay in the cache; the last block first, because under a causal mask it is the
    // longest.
    const int64_t head = task / blocks, block = blocks - 1 - task % blocks;
    const int64_t index = sequence_of_block(starts, block);
    const Sequence& sequence = problem.sequences[index];
    const int64_t row = (block - starts[index]) * kBlockM, b = sequence.batch, kv_head = head / problem.groups();
    const int64_t key_block =
        key_starts[index] * problem.num_kv_heads + kv_head * (key_starts[index + 1] - key_starts[index]);
    const KeyBlocks<M> k_blocks{k.at(b, kv_head, sequence.k_row), sequence.seqlen_k, head_dim,
                                k_packed ? k_packed + key_block * size : nullptr};
    const KeyBlocks<M> v_blocks{v.at(b, kv_head, sequence.k_row), sequence.seqlen_k, head_dim,
                                v_packed ? v_packed + key_block * size : nullptr};
    forward_block<M>(problem, sequence, row, q.at(b, head, sequence.q_row + row), k_blocks, v_blocks,
                     out.at(b, head, sequence.q_row + row), lse.at(b, head, sequence.q_row + row));
  });
  k_buffer.release_if_large();
  v_buffer.release_if_large();
}

// Backward

template <class M>
struct BackwardBuffers {
  Buffer<typename M::Element> q_t, dout_t, q, dout, k, k_t, v, p, ds, ds_right;
  Buffer<typename M::Accumulator> dq_t, lse, delta, s, dp, dk, dv;
};

struct BackwardHeads {
  Heads dout, dlse, q, k, v, out, lse, dq, dk, dv;
  bool has_dlse;
};

// P^T = exp(S^T - lse) and dS^T = P^T * (dP^T - delta), s and dp [keys][kBlockM], keys even. p and ds are left
// operands, ds_right is ds as a right one. A hidden key has s = -inf, and so p = ds = 0.
template <class M>
TOY_LM_NOINLINE void softmax_backward(const typename M::Accumulator* s, const typename M::Accumulator* dp,
                                      const typename M::Accumulator* lse, const typename M::Accumulator* delta,
                                      int64_t keys, int64_t first_column, int64_t columns,
                                      typename M::Accumulator factor, bool capped, typename M::Element* p,
                                      typename M::Element* ds, typename M::Element* ds_right) {
  constexpr int64_t kBlockM = M::kBlockM;
  using A = typename M::Accumulator;
  for (int64_t j = first_column; j < first_column + columns; j += kWidth<A>) {
    const Vec<A> lse_j = load(lse + j), delta_j = load(delta + j);
    for (int64_t n = 0; n < keys; n += 2) {
      Vec<A> weight[2], gradient[2];
      for (int i = 0; i < 2; ++i) {
        const Vec<A> score = load(s + (n + i) * kBlockM + j);
        weight[i] = M::weight(score * factor - lse_j);
        gradient[i] = weight[i] * (load(dp + (n + i) * kBlockM + j) - delta_j);
        // d tanh(x) = 1 - tanh(x)^2
        if (capped) gradient[i] = select<A>(weight[i] == A{0}, weight[i], gradient[i] * (A{1} - score * score));
      }
      Operands<M>::store_left(p, n, j, weight[0], weight[1]);
      Operands<M>::store_left(ds, n, j, gradient[0], gradient[1]);
      if constexpr (!Operands<M>::kOneLayout) Operands<M>::store_right(ds_right, n, j, gradient[0], gradient[1]);
    }
  }
}

// delta = rowsum(dO * O) - dlse, and lse in units of exp2; 0 in lanes that hold no query or one that sees no key.
template <int64_t kBlockM, class A>
TOY_LM_NOINLINE void read_row_statistics(const Matrix& dout, const Matrix& out, const Matrix& lse, const Matrix* dlse,
                                         int64_t rows, int64_t head_dim, A* lse_to, A* delta) {
  constexpr int W = kWidth<A>;
  alignas(64) A dout_rows[W * kMaxHeadDim], out_rows[W * kMaxHeadDim];
  const int64_t padded = round_up(head_dim, W);
  std::fill_n(lse_to, kBlockM, A{0});
  std::fill_n(delta, kBlockM, A{0});
  for (int64_t first = 0; first < rows; first += W) {
    const int64_t count = std::min<int64_t>(W, rows - first);
    const bool in_place = holds_vectors<A>(dout, head_dim) && holds_vectors<A>(out, head_dim);
    if (!in_place) {
      read_rows(dout.from(first), count, head_dim, dout_rows, padded, W);
      read_rows(out.from(first), count, head_dim, out_rows, padded, W);
    }
    Vec<A> sums[W] = {};
    for (int64_t i = 0; i < count; ++i) {
      const A* dout_i = in_place ? dout.row<A>(first + i) : dout_rows + i * padded;
      const A* out_i = in_place ? out.row<A>(first + i) : out_rows + i * padded;
      for (int64_t d = 0; d < padded; d += W) sums[i] += load(dout_i + d) * load(out_i + d);
    }
    store(delta + first, sum_rows<A, 1>(sums));
  }
  for (int64_t i = 0; i < rows; ++i) {
    const A lse_i = *lse.row<A>(i);
    if (lse_i != -std::numeric_limits<A>::infinity()) lse_to[i] = lse_i * A(kLog2E);
    if (dlse) delta[i] -= *dlse->row<A>(i);
  }
}

// dq of the queries [row_begin, row_end) of one head; what they add to dk and dv goes into dk, dv
// [seqlen_k][padded_dim].
template <class M>
void backward_chunk(const BackwardHeads& x, const Problem& problem, const Sequence& sequence, int64_t head,
                    int64_t row_begin, int64_t row_end, BackwardBuffers<M>& buffers, typename M::Accumulator* dk,
                    typename M::Accumulator* dv) {
  constexpr int64_t kBlockM = M::kBlockM;
  using A = typename M::Accumulator;
  using E = typename M::Element;
  const int64_t head_dim = problem.head_dim, padded_dim = Operands<M>::padded_dim(head_dim), b = sequence.batch;
  const int64_t kv_head = head / problem.groups(), size = kBlockM * padded_dim;
  const Visible visible(problem.options, sequence);
  const Scores<A> scores(problem.options);
  const KeyBlocks<M> k{x.k.at(b, kv_head, sequence.k_row), sequence.seqlen_k, head_dim};
  const KeyBlocks<M> v{x.v.at(b, kv_head, sequence.k_row), sequence.seqlen_k, head_dim};

  const int64_t blocks = ceil_div(row_end - row_begin, kBlockM);
  E* q_t = buffers.q_t.at_least(blocks * size);        // [blocks] right [head_dim][kBlockM]
  E* dout_t = buffers.dout_t.at_least(blocks * size);  // likewise
  const Matrix q_chunk = x.q.at(b, head, sequence.q_row + row_begin);
  const Matrix dout_chunk = x.dout.at(b, head, sequence.q_row + row_begin);
  const bool q_in_place = Operands<M>::right_in_place(q_chunk, head_dim);
  const bool dout_in_place = Operands<M>::right_in_place(dout_chunk, head_dim);
  E* q_packed = q_in_place ? nullptr : buffers.q.at_least(blocks * size);  // [blocks] right [kBlockM][padded_dim]
  E* dout_packed = dout_in_place ? nullptr : buffers.dout.at_least(blocks * size);  // likewise
  const E* q = q_in_place ? q_chunk.row<E>(0) : q_packed;
  const E* dout = dout_in_place ? dout_chunk.row<E>(0) : dout_packed;
  const int64_t q_row = q_in_place ? q_chunk.row_stride : padded_dim;
  const int64_t dout_row = dout_in_place ? dout_chunk.row_stride : padded_dim;
  A* dq_t = buffers.dq_t.at_least(blocks * size);  // [blocks][head_dim][kBlockM]
  A* lse = buffers.lse.at_least(blocks * kBlockM);
  A* delta = buffers.delta.at_least(blocks * kBlockM);
  A* s = buffers.s.at_least(kBlockN * kBlockM);    // S^T [kBlockN][kBlockM]
  A* dp = buffers.dp.at_least(kBlockN * kBlockM);  // dP^T likewise
  E *p, *ds, *ds_right;                            // P^T and dS^T
  if constexpr (Operands<M>::kOneLayout) {
    p = s;
    ds = ds_right = dp;
  } else {
    p = buffers.p.at_least(kBlockN * kBlockM);
    ds = buffers.ds.at_least(kBlockN * kBlockM);
    ds_right = buffers.ds_right.at_least(kBlockN * kBlockM);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = row_begin + block * kBlockM, rows = std::min(kBlockM, row_end - row),
                  first = sequence.q_row + row;
    const Matrix q_block = x.q.at(b, head, first), dout_block = x.dout.at(b, head, first);
    const Matrix dlse_block = x.has_dlse ? x.dlse.at(b, head, first) : Matrix();
    Operands<M>::right_columns(q_block, rows, head_dim, scores.negate, q_t + block * size);
    Operands<M>::right_columns(dout_block, rows, head_dim, false, dout_t + block * size);
    if (!q_in_place) Operands<M>::right_rows(q_block, rows, head_dim, q_packed + block * size);
    if (!dout_in_place) Operands<M>::right_rows(dout_block, rows, head_dim, dout_packed + block * size);
    read_row_statistics<kBlockM>(dout_block, x.out.at(b, head, first), x.lse.at(b, head, first),
                                 x.has_dlse ? &dlse_block : nullptr, rows, head_dim, lse + block * kBlockM,
                                 delta + block * kBlockM);
  }
  std::fill_n(dq_t, blocks * size, A{0});

  const int64_t depth = round_up(head_dim, M::kDepthUnit);
  const int64_t keys_begin = visible.key_begin(row_begin) / kBlockN * kBlockN, keys_end = visible.key_end(row_end - 1);
  for (int64_t n = keys_begin; n < keys_end; n += kBlockN) {
    const int64_t keys = std::min(kBlockN, keys_end - n);
    const Left<E> k_rows = k.rows(n, buffers.k), k_columns = k.columns(n, buffers.k_t), v_rows = v.rows(n, buffers.v);

    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = row_begin + block * kBlockM, rows = std::min(kBlockM, row_end - row);
      const int64_t columns = round_up(rows, std::max<int64_t>(kWidth<A>, M::kDepthUnit));
      if (visible.key_end(row + rows - 1) <= n || visible.key_begin(row) >= n + keys) continue;

      const int64_t row_last = row + rows;
      const bool masked = needs_mask(visible, row, row_last, n, n + keys);

      // S^T = K Q^T; dP^T = V dO^T
      multiply_tile<M>(visible, masked, row, row_last, n, keys, columns, depth, k_rows, q_t + block * size, s);
      multiply_tile<M>(visible, masked, row, row_last, n, keys, columns, depth, v_rows, dout_t + block * size, dp);

      // A masked tile is taken in parts: first some queries, each part with the keys [begin, end) that it sees...
      const int64_t step = masked ? M::kMaskedColumns : kBlockM;
      for (int64_t m = 0; m < rows; m += step) {
        const int64_t part = std::min(step, rows - m), part_columns = std::min(step, columns - m);
        const int64_t begin = std::max<int64_t>(visible.key_begin(row + m) - n, 0) / step * step;
        const int64_t end = std::min(round_up(visible.key_end(row + m + part - 1) - n, step), keys);
        if (end <= begin) continue;
        A* s_part = s + begin * kBlockM;
        A* dp_part = dp + begin * kBlockM;

        // Mask
        if (scores.capped) soft_cap<kBlockM>(s_part + m, end - begin, part_columns, scores.before_cap);
        if (masked || rows < columns)
          mask<kBlockM>(visible, row + m, part, n + begin, end - begin, part_columns, s_part + m);

        // P^T = exp(S^T - lse); dS^T = P^T * (dP^T - delta)
        const int64_t padded_keys = hide_padding<M>(s_part + m, end - begin, part_columns);
        for (int64_t i = end - begin; i < padded_keys; ++i) std::fill_n(dp_part + i * kBlockM + m, part_columns, A{0});
        softmax_backward<M>(s_part, dp_part, lse + block * kBlockM, delta + block * kBlockM, padded_keys, m,
                            part_columns, scores.factor, scores.capped, p + begin * kBlockM, ds + begin * kBlockM,
                            ds_right + begin * kBlockM);

        // dQ^T += K^T dS^T
        M::multiply(round_up(head_dim, M::kRowUnit), part_columns, round_up(end - begin, M::kDepthUnit),
                    k_columns.from_depth(begin), ds_right + begin * kBlockM + m * M::kPairing, kBlockM,
                    dq_t + block * size + m, kBlockM, false);
      }

      // ... then some keys, with the queries that see them.
      const int64_t key_step = masked ? M::kMaskedColumns : keys;
      for (int64_t i = 0; i < keys; i += key_step) {
        const int64_t part_rows = round_up(std::min(key_step, keys - i), M::kRowUnit);
        auto [first, last] = visible.queries(n + i, n + std::min(i + key_step, keys), row, row_last);
        if (last <= first) continue;
        first = first / step * step;
        const int64_t row_depth = round_up(last - first, M::kDepthUnit), left = i * kBlockM + first,
                      right = block * kBlockM + first;

        // dV += P^T dO
        M::multiply(part_rows, padded_dim, row_depth, {p + left, kBlockM, 1}, dout + right * dout_row, dout_row,
                    dv + (n + i) * padded_dim, padded_dim, false);

        // dK += dS^T Q
        M::multiply(part_rows, padded_dim, row_depth, {ds + left, kBlockM, 1}, q + right * q_row, q_row,
                    dk + (n + i) * padded_dim, padded_dim, false);
      }
    }
  }

  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = row_begin + block * kBlockM;
    A* dq_block = dq_t + block * size;
    for (int64_t i = 0; i < size; ++i) dq_block[i] *= static_cast<A>(problem.options.softmax_scale);
    write_transposed<kBlockM>(x.dq.at(b, head, sequence.q_row + row), std::min(kBlockM, row_end - row), head_dim,
                              dq_block);
  }
}

// One task is one key head, with all query heads that share it; dk and dv add up in memory of its own. Where there are
// few key heads, the chunks of queries are dealt out to several tasks ("shares"), whose dk and dv are added at the end,
// always in the same order. How many shares there are depends on the shapes alone.
template <class M>
void backward_all(const Problem& problem, const BackwardHeads& x) {
  using A = typename M::Accumulator;
  const int64_t num_sequences = static_cast<int64_t>(problem.sequences.size()), num_kv_heads = problem.num_kv_heads;
  const int64_t head_dim = problem.head_dim, padded_dim = Operands<M>::padded_dim(head_dim), groups = problem.groups();
  int64_t longest_q = 0, longest_k = 0;
  for (const Sequence& sequence : problem.sequences) {
    longest_q = std::max(longest_q, sequence.seqlen_q);
    longest_k = std::max(longest_k, sequence.seqlen_k);
  }
  const int64_t heads = num_sequences * num_kv_heads;
  if (heads == 0) return;
  const int64_t units = groups * ceil_div(longest_q, kChunk);
  const int64_t shares = std::clamp<int64_t>(ceil_div(kBackwardTasks, heads), 1, std::max<int64_t>(units, 1));
  const int64_t gradient = round_up(longest_k, kBlockN) * padded_dim;  // elements of one dk
  thread_local Buffer<A> buffer;  // [heads][shares][dk, dv][padded seqlen_k][padded_dim]
  A* partials = shares > 1 ? buffer.at_least(heads * shares * 2 * gradient) : nullptr;

  const auto write = [&](int64_t index, int64_t kv_head, const A* dk, const A* dv) {
    const Sequence& sequence = problem.sequences[index];
    const A scale = static_cast<A>(problem.options.softmax_scale);
    write_rows(x.dk.at(sequence.batch, kv_head, sequence.k_row), sequence.seqlen_k, head_dim, scale, dk, padded_dim);
    write_rows(x.dv.at(sequence.batch, kv_head, sequence.k_row), sequence.seqlen_k, head_dim, A{1}, dv, padded_dim);
  };

  for_each_task(heads * shares, 2.5 * count_flops(problem), [&](int64_t task) {
    thread_local BackwardBuffers<M> buffers;
    [[maybe_unused]] const typename M::Session session;
    const int64_t share = task % shares, index = task / shares / num_kv_heads, kv_head = task / shares % num_kv_heads;
    const Sequence& sequence = problem.sequences[index];
    A* dk = shares > 1 ? partials + task * 2 * gradient : buffers.dk.at_least(gradient);
    A* dv = shares > 1 ? dk + gradient : buffers.dv.at_least(gradient);
    std::fill_n(dk, gradient, A{0});
    std::fill_n(dv, gradient, A{0});
    const int64_t chunks = ceil_div(sequence.seqlen_q, kChunk);
    for (int64_t unit = share; unit < groups * chunks; unit += shares) {
      const int64_t head = kv_head * groups + unit / chunks, row = unit % chunks * kChunk;
      backward_chunk<M>(x, problem, sequence, head, row, std::min(row + kChunk, sequence.seqlen_q), buffers, dk, dv);
    }
    if (shares == 1) write(index, kv_head, dk, dv);
    buffers.dk.release_if_large();
    buffers.dv.release_if_large();
  });
  if (shares == 1) return;

  for_each_task(heads, 2.5 * count_flops(problem), [&](int64_t task) {
    A* sum = partials + task * shares * 2 * gradient;
    for (int64_t share = 1; share < shares; ++share)
      for (int64_t i = 0; i < 2 * gradient; ++i) sum[i] += sum[share * 2 * gradient + i];
    write(task / num_kv_heads, task % num_kv_heads, sum, sum + gradient);
  });
  buffer.release_if_large();
}

// Decoding: few queries, so that the cache is read once and every vector lies along head_dim. One task, a split, is all
// queries of one key head and kDecodeSplit keys: all scores, their softmax, then all values, each a long stream. With
// AVX512_BF16 a bf16 cache is multiplied by q and P in bf16; everything else is in fp32.
//
// Of a row of the cache kPair elements are taken at a time, in the order that its arithmetic gets most cheaply:
//
//   FloatRows<float>      x = elements 0 .. W - 1       y = elements W .. 2 W - 1
//   FloatRows<BFloat16>   x = the even ones             y = the odd ones, each the upper half of a float
//   Bf16Dots              K as it lies; V of two keys in pairs, x = the lower four of every eight, y = the upper ones
//
// q is brought into K's order first, and the result back from V's order last.

constexpr int64_t kPair = 2 * kWidth<float>;

// Rows of the cache in the order in which they are read: one after the other, or in turns from four streams, each with
// a quarter of the rows.
template <class T>
struct CacheRows {
  const T* first;
  int64_t step, next_four;  // from a row to the one read next, and from that to the one four later
  int64_t quarter = 0;      // rows in a stream, if there are four

  const T* row(int64_t i) const { return first + (i & 3) * step + (i >> 2) * next_four; }
  int64_t key(int64_t i) const { return quarter ? (i & 3) * quarter + (i >> 2) : i; }

  static CacheRows in_order(const T* first, int64_t stride) { return {first, stride, 4 * stride}; }
  static CacheRows in_streams(const T* first, int64_t stride, int64_t rows) {
    return {first, rows / 4 * stride, stride, rows / 4};
  }
};

template <class V>
struct Two {
  V x, y;
};
using Pair = Two<Vec<float>>;

template <class T>
struct FloatRows {
  using Element = T;
  using Query = float;  // what q and P are stored as
  static constexpr int64_t kValueKeys = 1;

  // Where the element that stands at i, x first and then y, stands in a row.
  static constexpr int place_in_query(int i) {
    if constexpr (std::is_same_v<T, float>) return i;
    return i < kWidth<float> ? 2 * i : 2 * (i - kWidth<float>)+1;
  }
  static constexpr int place_in_values(int i) { return place_in_query(i); }

  static Pair load_key(const float* p) { return {keep(load(p)), keep(load(p + kWidth<float>))}; }
  static Pair load_key(const BFloat16* p) {
    const Vec<uint32_t> both = keep(load(reinterpret_cast<const uint32_t*>(p)));
    return {(Vec<float>)(both << 16), (Vec<float>)(both & 0xffff0000u)};
  }
  static Vec<float> add_score(Vec<float> sum, const Pair& q, const Pair& k) { return sum + q.x * k.x + q.y * k.y; }

  static void store_weights(float* p, Vec<float> x) { store(p, x); }
  static Vec<float> load_weight(const float* p) { return broadcast(*p); }
  static Pair load_values(const T* v, const T*) { return load_key(v); }
  static Vec<float> add_value(Vec<float> sum, Vec<float> p, Vec<float> v) { return sum + p * v; }
};

#if defined(TOY_LM_BF16_PAIRS) && !defined(TOY_LM_AMX)
struct Bf16Dots {
  using Element = BFloat16;
  using Query = BFloat16;
  static constexpr int64_t kValueKeys = 2;

  static constexpr int place_in_query(int i) { return i; }
  static constexpr int place_in_values(int i) { return i % 16 / 4 * 8 + i / 16 * 4 + i % 4; }

  static Vec<uint32_t> load_key(const BFloat16* p) { return keep(load(reinterpret_cast<const uint32_t*>(p))); }
  static Vec<float> add_score(Vec<float> sum, Vec<uint32_t> q, Vec<uint32_t> k) { return dot_pairs(sum, q, k); }

  static void store_weights(BFloat16* p, Vec<float> x) { store_rounded(p, x); }
  static Vec<uint32_t> load_weight(const BFloat16* p) {
    uint32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return broadcast(pair);
  }
  static Two<Vec<uint32_t>> load_values(const BFloat16* even, const BFloat16* odd) {
    const __m512i low = (__m512i)load_key(even), high = (__m512i)load_key(odd);
    return {(Vec<uint32_t>)_mm512_unpacklo_epi16(low, high), (Vec<uint32_t>)_mm512_unpackhi_epi16(low, high)};
  }
  static Vec<float> add_value(Vec<float> sum, Vec<uint32_t> p, Vec<uint32_t> v) { return dot_pairs(sum, v, p); }
};
#endif

// For a bf16 cache. Where there is AMX too, AVX512_BF16 is slow.
#if defined(TOY_LM_BF16_PAIRS) && !defined(TOY_LM_AMX)
using Bf16Rows = Bf16Dots;
#else
using Bf16Rows = FloatRows<BFloat16>;
#endif

// Calls f(row, number of rows as a constant) for rows 0 to rows - 1, kMost at once as far as that goes.
template <int kMost, class F>
void for_row_groups(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + kMost <= rows; r += kMost) f(r, std::integral_constant<int, kMost>());
  for (; r < rows; ++r) f(r, std::integral_constant<int, 1>());
}

// Asks for what lies a page further on than the rows [begin, end).
template <class T>
inline void prefetch_rows(const CacheRows<T>& cache, int64_t begin, int64_t end, int64_t padded_dim) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t d = 0; d < padded_dim; d += 64 / sizeof(T))
      __builtin_prefetch(reinterpret_cast<const char*>(cache.row(i) + d) + 4096, 0, 1);
}

// s[r][n] = q_r . k_n for kRows queries and the keys [begin, end). q [rows][padded_dim] in K's order; s
// [rows][kDecodeSplit].
template <int kRows, class M>
TOY_LM_NOINLINE void decode_scores(const typename M::Query* q, int64_t padded_dim,
                                   const CacheRows<typename M::Element>& k, int64_t begin, int64_t end, bool far,
                                   float* s) {
  constexpr int W = kWidth<float>, kKeys = W / kRows, kTogether = std::min(kKeys, 4);
  for (int64_t n = begin; n < end; n += kKeys) {
    if (far) prefetch_rows(k, n, std::min(n + kKeys, end), padded_dim);
    Vec<float> sums[W] = {};
#pragma GCC unroll 16
    for (int first = 0; first < kKeys; first += kTogether) {
      const typename M::Element* row[kTogether];
      for (int i = 0; i < kTogether; ++i) row[i] = k.row(std::min(n + first + i, end - 1));
      for (int64_t d = 0; d < padded_dim; d += kPair) {
        decltype(M::load_key(q)) q_d[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) q_d[r] = M::load_key(q + r * padded_dim + d);
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) {
          const auto k_d = M::load_key(row[i] + d);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            Vec<float>& sum = sums[r * kKeys + first + i];
            sum = M::add_score(sum, q_d[r], k_d);
          }
        }
      }
    }
    const Vec<float> scores = sum_rows<float, 1>(sums);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      std::memcpy(s + r * kDecodeSplit + n, reinterpret_cast<const float*>(&scores) + r * kKeys, kKeys * sizeof(float));
  }
}

// acc_r += sum_n p[r][n] v_n for kRows queries, the keys [begin, end) and kPairs pairs of columns.
template <int kRows, int kPairs, class M>
inline void decode_values_tile(const typename M::Query* p, int64_t p_row, const CacheRows<typename M::Element>& v,
                               int64_t begin, int64_t end, int64_t d, float* acc, int64_t padded_dim) {
  constexpr int W = kWidth<float>;
  Pair sums[kRows][kPairs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kPairs; ++j) {
      const float* at = acc + r * padded_dim + d + j * kPair;
      sums[r][j] = {load(at), load(at + W)};
    }
  for (int64_t n = begin; n < end; n += M::kValueKeys) {
    const typename M::Element *first = v.row(n) + d, *last = v.row(std::min(n + M::kValueKeys, end) - 1) + d;
    decltype(M::load_values(first, last)) v_n[kPairs];
#pragma GCC unroll 4
    for (int j = 0; j < kPairs; ++j) {
      v_n[j] = M::load_values(first + j * kPair, last + j * kPair);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const auto p_n = M::load_weight(p + r * p_row + n);
#pragma GCC unroll 4
      for (int j = 0; j < kPairs; ++j) {
        sums[r][j].x = M::add_value(sums[r][j].x, p_n, v_n[j].x);
        sums[r][j].y = M::add_value(sums[r][j].y, p_n, v_n[j].y);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kPairs; ++j) {
      store(acc + r * padded_dim + d + j * kPair, sums[r][j].x);
      store(acc + r * padded_dim + d + j * kPair + W, sums[r][j].y);
    }
}

// The same for all `rows` queries and all columns. From memory, few keys at a time: what is read again, for other
// queries, is then still in the first cache.
template <int kRows, int kPairs, class M>
TOY_LM_NOINLINE void decode_values(int64_t rows, const typename M::Query* p, int64_t p_row,
                                   const CacheRows<typename M::Element>& v, int64_t begin, int64_t end, bool far,
                                   float* acc, int64_t padded_dim) {
  const int64_t step = far ? 16 : end - begin;
  for (int64_t n = begin; n < end; n += step) {
    const int64_t last = std::min(n + step, end);
    if (far) prefetch_rows(v, n, last, padded_dim);
    for_row_groups<kRows>(rows, [&](int64_t r, auto group) {
      int64_t d = 0;
      for (; d + kPairs * kPair <= padded_dim; d += kPairs * kPair)
        decode_values_tile<group(), kPairs, M>(p + r * p_row, p_row, v, n, last, d, acc + r * padded_dim, padded_dim);
      for (; d < padded_dim; d += kPair)
        decode_values_tile<group(), 1, M>(p + r * p_row, p_row, v, n, last, d, acc + r * padded_dim, padded_dim);
    });
  }
}

template <class Query>
struct DecodeBuffers {
  Buffer<Query> q;
  Buffer<float> s, copy;
};

// p [count] = exp(s - row_max), zeros up to the next whole vector; p may be the memory of s. Returns the greatest score
// and the sum.
template <class M>
std::pair<float, float> softmax_row(float* s, int64_t count, float factor, typename M::Query* p) {
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  constexpr int W = kWidth<float>;
  std::fill(s + count, s + round_up(count, W), kHidden);
  Vec<float> maxima = broadcast(kHidden), sums{};
  for (int64_t i = 0; i < count; i += W) maxima = max<float>(load(s + i), maxima);
  const float row_max = max_lanes<float>(maxima), shift = row_max == kHidden ? 0.0f : row_max * factor;
  for (int64_t i = 0; i < count; i += W) {
    const Vec<float> weights = exp2(load(s + i) * factor - shift);
    M::store_weights(p + i, weights);
    sums += weights;
  }
  return {row_max, sum_lanes<float>(sums)};
}

// Can rows of a cache be read as they lie?
template <class T>
bool pairs_in_place(const Matrix& matrix, int64_t head_dim) {
  constexpr ScalarType dtype = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::BFloat16;
  return matrix.dtype == dtype && matrix.dim_stride == 1 && head_dim % kPair == 0;
}

// `rows` rows of a cache as T, where they lie or as a copy in `scratch`, zero beyond head_dim.
//
// Where they lie, they are read as four streams. The processor's own prefetching stops at the end of a page, so that
// one stream leaves the memory idle at every page: two cores read 36 GB/s in one stream each, 49 in four, and 55 if
// they ask for the next page as well (Zen 4, 4 KB pages). The order does not depend on what else is in the batch.
template <class T>
CacheRows<T> cache_rows(const Matrix& matrix, int64_t first, int64_t rows, int64_t head_dim, Buffer<float>& scratch) {
  if constexpr (std::is_same_v<T, float>)
    if (!pairs_in_place<float>(matrix, head_dim)) {
      const int64_t stride = round_up(head_dim, kPair);
      float* copy = scratch.at_least(kDecodeSplit * stride);
      read_rows(matrix.from(first), rows, head_dim, copy, stride, rows);
      return CacheRows<T>::in_order(copy, stride);
    }
  const T* row = matrix.row<T>(first);
  if (rows % 4 == 0) return CacheRows<T>::in_streams(row, matrix.row_stride, rows);
  return CacheRows<T>::in_order(row, matrix.row_stride);
}

// One query in the order and type of a cache's arithmetic: to [padded_dim], zero beyond head_dim.
template <class M>
void read_query(const Matrix& row, int64_t head_dim, int64_t padded_dim, typename M::Query* to) {
  if constexpr (std::is_same_v<typename M::Query, float>) {
    float ordered[kMaxHeadDim];
    read_rows(row, 1, head_dim, ordered, padded_dim, 1);
    for (int64_t d = 0; d < padded_dim; d += kPair)
#pragma GCC unroll 32
      for (int i = 0; i < kPair; ++i) to[d + i] = ordered[d + M::place_in_query(i)];
  } else {
    for (int64_t d = 0; d < head_dim; ++d) to[d] = row.row<BFloat16>(0)[d * row.dim_stride];
  }
}

// The queries of the heads that share a key head, over keys [key_begin, key_end), at most kDecodeSplit: acc
// [rows][padded_dim], not yet divided by row_sum, and row_max, row_sum [rows]. Row r is query r % seqlen_q of head
// r / seqlen_q of the group.
template <class M>
void decode_split(const Problem& problem, const Sequence& sequence, int64_t kv_head, int64_t key_begin, int64_t key_end,
                  const Heads& q, const Matrix& k, const Matrix& v, bool far, float* acc, float* row_max,
                  float* row_sum) {
  using T = typename M::Element;
  using Query = typename M::Query;
  thread_local DecodeBuffers<Query> buffers;
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  constexpr int W = kWidth<float>;
  constexpr int kMost = kRegisters == 32 ? 4 : 2;  // query rows at once
  const int64_t head_dim = problem.head_dim, padded_dim = round_up(head_dim, kPair), groups = problem.groups();
  const int64_t seqlen_q = sequence.seqlen_q, rows = groups * seqlen_q;
  const Visible visible(problem.options, sequence);
  const Scores<float> scores(problem.options);
  std::fill_n(acc, rows * padded_dim, 0.0f);
  std::fill_n(row_max, rows, kHidden);
  std::fill_n(row_sum, rows, 0.0f);
  key_begin = std::max(key_begin, visible.key_begin(0));
  key_end = std::min(key_end, visible.key_end(seqlen_q - 1));
  if (key_begin >= key_end) return;

  Query* q_rows = buffers.q.at_least(rows * padded_dim);
  float* s = buffers.s.at_least(rows * kDecodeSplit);  // S [rows][kDecodeSplit]
  Query* p = reinterpret_cast<Query*>(s);              // P [rows][p_row], in the same place
  constexpr int64_t p_row = kDecodeSplit * sizeof(float) / sizeof(Query);
  for (int64_t r = 0; r < rows; ++r)
    read_query<M>(q.at(sequence.batch, kv_head * groups + r / seqlen_q, r % seqlen_q), head_dim, padded_dim,
                  q_rows + r * padded_dim);

  // S = Q K^T
  const int64_t keys = key_end - key_begin;
  const CacheRows<T> k_rows = cache_rows<T>(k, key_begin, keys, head_dim, buffers.copy);
  for (int64_t n = 0; n < keys; n += kBlockN)
    for_row_groups<kMost>(rows, [&](int64_t r, auto group) {
      decode_scores<group(), M>(q_rows + r * padded_dim, padded_dim, k_rows, n, std::min(n + kBlockN, keys),
                                far && r == 0, s + r * kDecodeSplit);
    });
  for (int64_t r = 0; r < rows; ++r) {
    float* s_row = s + r * kDecodeSplit;
    if (scores.negate || scores.capped)
      for (int64_t i = 0; i < keys; i += W) {
        const Vec<float> score = scores.negate ? -load(s_row + i) : load(s_row + i);
        store(s_row + i, scores.capped ? tanh(score * scores.before_cap) : score);
      }

    // Mask
    const int64_t first = visible.key_begin(r % seqlen_q) - key_begin, last = visible.key_end(r % seqlen_q) - key_begin;
    if (first > 0 || last < keys)
      for (int64_t i = 0; i < keys; ++i)
        if (k_rows.key(i) < first || k_rows.key(i) >= last) s_row[i] = kHidden;

    // Softmax
    std::tie(row_max[r], row_sum[r]) = softmax_row<M>(s_row, keys, scores.factor, p + r * p_row);
  }

  // O = P V
  const CacheRows<T> v_rows = cache_rows<T>(v, key_begin, keys, head_dim, buffers.copy);
  for (int64_t n = 0; n < keys; n += kBlockN) {
    const int64_t end = std::min(n + kBlockN, keys);
    if (kMost == 4 && far && padded_dim > 2 * kPair)  // half as many queries at once, so that rows are read whole
      decode_values<2, 4, M>(rows, p, p_row, v_rows, n, end, far, acc, padded_dim);
    else
      decode_values<kMost, 2, M>(rows, p, p_row, v_rows, n, end, far, acc, padded_dim);
  }
}

// Where a softmax's parts were computed apart, out = sum of 2^(max_i - max) acc_i / sum of 2^(max_i - max) sum_i.
TOY_LM_NOINLINE void combine_splits(const float* acc, const float* row_max, const float* row_sum, int64_t splits,
                                    int64_t rows, int64_t row, int64_t padded_dim, float factor, float* out) {
  float greatest = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (int64_t split = 0; split < splits; ++split)
    if (row_sum[split * rows + row] != 0) greatest = std::max(greatest, row_max[split * rows + row]);
  std::fill_n(out, padded_dim, 0.0f);
  for (int64_t split = 0; split < splits; ++split) {
    const int64_t at = split * rows + row;
    if (row_sum[at] == 0) continue;
    const float weight = std::exp2((row_max[at] - greatest) * factor);
    total += weight * row_sum[at];
    for (int64_t d = 0; d < padded_dim; ++d) out[d] += weight * acc[at * padded_dim + d];
  }
  if (total != 0)
    for (int64_t d = 0; d < padded_dim; ++d) out[d] /= total;
}

template <class M>
void decode_all(const Problem& problem, const Heads& q, const Heads& k, const Heads& v, const Heads& out) {
  const int64_t num_kv_heads = problem.num_kv_heads, groups = problem.groups(), head_dim = problem.head_dim;
  const int64_t padded_dim = round_up(head_dim, kPair), seqlen_q = problem.sequences[0].seqlen_q,
                rows = groups * seqlen_q;
  int64_t longest = 0, keys = 0;
  for (const Sequence& sequence : problem.sequences) {
    longest = std::max(longest, sequence.seqlen_k);
    keys += sequence.seqlen_k;
  }
  const bool far = 2 * keys * num_kv_heads * head_dim * int64_t{sizeof(typename M::Element)} > kFarBytes;
  const int64_t splits = std::max<int64_t>(ceil_div(longest, kDecodeSplit), 1);
  const int64_t heads = static_cast<int64_t>(problem.sequences.size()) * num_kv_heads;
  const double flops = 16.0 * count_flops(problem);  // bound by memory, an operation takes the time of many

  // [heads][splits][rows][padded_dim], then row_max and row_sum [heads][splits][rows]
  thread_local Buffer<float> partials;
  float* acc = partials.at_least(heads * splits * rows * (padded_dim + 2));
  float* row_max = acc + heads * splits * rows * padded_dim;
  float* row_sum = row_max + heads * splits * rows;
  const std::unique_ptr<std::atomic<int64_t>[]> done(new std::atomic<int64_t>[heads]());
  for_each_task(heads * splits, flops, [&](int64_t task) {
    const int64_t head = task / splits, kv_head = head % num_kv_heads, begin = task % splits * kDecodeSplit;
    const Sequence& sequence = problem.sequences[head / num_kv_heads];
    decode_split<M>(problem, sequence, kv_head, begin, std::min(begin + kDecodeSplit, sequence.seqlen_k), q,
                    k.at(sequence.batch, kv_head, 0), v.at(sequence.batch, kv_head, 0), far,
                    acc + task * rows * padded_dim, row_max + task * rows, row_sum + task * rows);
    if (done[head].fetch_add(1, std::memory_order_acq_rel) + 1 < splits) return;
    // Whoever has computed the last of a head's splits puts them together.
    float row_out[kMaxHeadDim], ordered[kMaxHeadDim];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = head * splits * rows;
      combine_splits(acc + first * padded_dim, row_max + first, row_sum + first, splits, rows, r, padded_dim,
                     Scores<float>(problem.options).factor, row_out);
      for (int64_t d = 0; d < padded_dim; d += kPair)
#pragma GCC unroll 32
        for (int i = 0; i < kPair; ++i) ordered[d + M::place_in_values(i)] = row_out[d + i];
      write_rows(out.at(sequence.batch, kv_head * groups + r / seqlen_q, r % seqlen_q), 1, head_dim, 1.0f, ordered,
                 padded_dim);
    }
  });
}

// The ops, as op.py declares them

// Calls f with the arithmetic for a dtype; kPairBlockM is the number of queries in a block where pairs are multiplied.
template <int64_t kPairBlockM, class F>
void with_arithmetic(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Double) return f(Plain<double>{});
#if defined(TOY_LM_BF16_PAIRS)
  if (dtype == ScalarType::BFloat16 && Bf16PairProducts::worthwhile()) return f(Bf16Pairs<kPairBlockM>{});
#endif
  f(Plain<float>{});
}

Problem dense_problem(const Tensor& q, const Tensor& k, const Options& options) {
  Problem problem{q.size(1), k.size(1), q.size(3), options, {}};
  for (int64_t b = 0; b < q.size(0); ++b) problem.sequences.push_back({b, 0, 0, q.size(2), k.size(2)});
  return problem;
}

// Reads the documents' bounds, and checks them: here that costs nothing, and a wrong one would reach foreign memory.
std::vector<std::pair<int64_t, int64_t>> documents(const Tensor& cu_seqlens, int64_t total, int64_t longest,
                                                   const char* side) {
  const int32_t* bounds = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t count = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(bounds[0] == 0 && bounds[count] == total, "cu_seqlens_", side, ": got ", bounds[0], " to ",
                  bounds[count], ", needs 0 to the ", total, " rows of ", side);
  std::vector<std::pair<int64_t, int64_t>> rows;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = int64_t{bounds[i + 1]} - bounds[i];
    STD_TORCH_CHECK(length >= 0, "cu_seqlens_", side, ": got ", bounds[i], " before ", bounds[i + 1],
                    ", needs rising bounds");
    STD_TORCH_CHECK(length <= longest, "max_seqlen_", side, ": got ", longest, ", but document ", i, " has ", length,
                    " rows");
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

// Torch's own empty_like and new_empty look their operator up by its name in every call: 0.7 us each.
Tensor uninitialized(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor uninitialized_like(const Tensor& x) {
  if (!x.is_contiguous()) return torch::stable::empty_like(x);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  const auto sizes = x.sizes();
  return uninitialized({sizes.begin(), sizes.end()}, dtype);
}

std::tuple<Tensor, Tensor> run_forward(const Problem& problem, const Tensor& q, const Tensor& k, const Tensor& v,
                                       bool packed) {
  const ScalarType dtype = q.scalar_type();
  const int32_t lse_dtype = dtype == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  Tensor out = uninitialized_like(q);
  Tensor lse = packed ? uninitialized({q.size(1), q.size(0)}, lse_dtype)
                      : uninitialized({q.size(0), q.size(1), q.size(2)}, lse_dtype);
  with_arithmetic<32>(dtype, [&](auto arithmetic) {
    forward_all<decltype(arithmetic)>(problem, Heads(q, packed, true), Heads(k, packed, true), Heads(v, packed, true),
                                      Heads(out, packed, true), Heads(lse, packed, false));
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> run_backward(const Problem& problem, const Tensor& dout,
                                                const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
                                                const Tensor& v, const Tensor& out, const Tensor& lse, bool packed) {
  Tensor dq = uninitialized_like(q), dk = uninitialized_like(k), dv = uninitialized_like(v);
  BackwardHeads x{Heads(dout, packed, true), dlse ? Heads(*dlse, packed, false) : Heads(),
                  Heads(q, packed, true),    Heads(k, packed, true),
                  Heads(v, packed, true),    Heads(out, packed, true),
                  Heads(lse, packed, false), Heads(dq, packed, true),
                  Heads(dk, packed, true),   Heads(dv, packed, true),
                  dlse.has_value()};
  with_arithmetic<64>(q.scalar_type(), [&](auto arithmetic) { backward_all<decltype(arithmetic)>(problem, x); });
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> flash_attention_forward(Tensor q, Tensor k, Tensor v, double softmax_scale, bool causal,
                                                   int64_t window_size, double softcap) {
  return run_forward(dense_problem(q, k, {softmax_scale, causal, window_size, softcap}), q, k, v, false);
}

std::tuple<Tensor, Tensor, Tensor> flash_attention_backward(Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k,
                                                            Tensor v, Tensor out, Tensor lse, double softmax_scale,
                                                            bool causal, int64_t window_size, double softcap) {
  return run_backward(dense_problem(q, k, {softmax_scale, causal, window_size, softcap}), dout, dlse, q, k, v, out, lse,
                      false);
}

std::tuple<Tensor, Tensor> flash_attention_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,
                                                          Tensor cu_seqlens_k, int64_t max_seqlen_q,
                                                          int64_t max_seqlen_k, double softmax_scale, bool causal,
                                                          int64_t window_size, double softcap) {
  const Options options{softmax_scale, causal, window_size, softcap};
  return run_forward(packed_problem(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options), q, k, v,
                     true);
}

std::tuple<Tensor, Tensor, Tensor> flash_attention_varlen_backward(Tensor dout, std::optional<Tensor> dlse, Tensor q,
                                                                   Tensor k, Tensor v, Tensor out, Tensor lse,
                                                                   Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                                                   int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                                   double softmax_scale, bool causal,
                                                                   int64_t window_size, double softcap) {
  const Options options{softmax_scale, causal, window_size, softcap};
  const Problem problem = packed_problem(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options);
  return run_backward(problem, dout, dlse, q, k, v, out, lse, true);
}

Tensor decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, double softmax_scale,
                        int64_t window_size, double softcap) {
  Problem problem{q.size(1), k_cache.size(1), q.size(3), {softmax_scale, true, window_size, softcap}, {}};
  const int32_t* seqlens = static_cast<const int32_t*>(cache_seqlens.const_data_ptr());
  for (int64_t b = 0; b < q.size(0); ++b) {
    STD_TORCH_CHECK(seqlens[b] >= 0 && seqlens[b] <= k_cache.size(2), "cache_seqlens: got ", seqlens[b],
                    " for sequence ", b, ", allowed are 0 to the capacity ", k_cache.size(2));
    problem.sequences.push_back({b, 0, 0, q.size(2), seqlens[b]});
  }
  if (q.numel() == 0) return uninitialized_like(q);
  if (q.scalar_type() == ScalarType::Double || problem.groups() * q.size(2) > kDecodeRows)
    return std::get<0>(run_forward(problem, q, k_cache, v_cache, false));
  Tensor out = uninitialized_like(q);
  const Heads k(k_cache, false, true), v(v_cache, false, true);
  const bool in_place =
      pairs_in_place<BFloat16>(k.first, problem.head_dim) && pairs_in_place<BFloat16>(v.first, problem.head_dim);
  const auto decode = in_place ? decode_all<Bf16Rows> : decode_all<FloatRows<float>>;
  decode(problem, Heads(q, false, true), k, v, Heads(out, false, true));
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
