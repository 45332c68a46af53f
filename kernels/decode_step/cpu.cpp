// One step of a decoder on the CPU: a handful of passes over the weights, each split over the threads by output rows.
//
// Per layer, for every token b: one of each sequence, or several, one after the other, when a prompt is read:
//   1. qkv = W_qkv norm(x)                        rows of W_qkv
//   2. q, k normalised and rotated; k, v cached; attention of q over the cache     (sequence, key head) pairs
//   3. x = x + W_o attention                      rows of W_o
//   4. hidden = silu(W_gate norm(x)) * W_up norm(x)   rows of W_gate, and the same of W_up
//   5. x = x + W_down hidden                      rows of W_down
// and at the end logits = embedding norm(x).
//
// The weights come packed (op.py: DecodeWeights.packed): kLanes rows side by side, so that a vector of them times one
// activation is a step of kLanes outputs' sums, and what is read lies in a line. A tile of rows and sequences stays in
// registers, so that a weight that was read serves every sequence of the tile. An output is a sum over the inner
// dimension in an order that depends on neither the batch nor the number of threads.
//
// A bf16 model is multiplied in pairs of bf16 where the machine does that faster than in floats, its int8 weights too,
// and the activations are rounded for it. Else weights are widened to fp32 when loaded; the scales of int8 rows multiply
// the outputs. Caches are fp32 or bf16, everything else is fp32. Weights that are not packed are multiplied row by row;
// AMX takes bf16 ones so, at every batch size.
//
// Knows torch's stable ABI and the vectors of microkernels.h; knows nothing of how it is compiled (load.py).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "flash_attention/microkernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int kLanes = kWidth<float>;
constexpr int kColumns = kRegisters >= 32 ? 8 : 4;  // sequences of a product's widest tile
constexpr int64_t kGrain = 1 << 14;                 // multiplications that are worth another thread

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(BFloat16 x) {
  return torch::headeronly::BFloat16(x.bits, torch::headeronly::BFloat16::from_bits());
}
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, BFloat16* to) { to->bits = torch::headeronly::BFloat16(x).x; }

// One number at p, or kLanes of them: what a product leaves at once.
template <class V>
inline V read(const float* p) {
  if constexpr (sizeof(V) == sizeof(float)) return *p;
  else return load(p);
}
inline void write(float* p, float x) { *p = x; }
inline void write(float* p, Vec<float> x) { store(p, x); }

// kLanes numbers, rounded as one by one.
inline void narrow(Vec<float> x, float* to) { store(to, x); }

inline void narrow(Vec<float> x, BFloat16* to) {
#if defined(TOY_LM_BF16_PAIRS)
  store_rounded(to, x);
#else
  typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
  const Vec<uint32_t> bits = (Vec<uint32_t>)x;
  const Vec<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Half halves = __builtin_convertvector(x == x ? rounded : rounded * 0 + 0x7fc0, Half);
  std::memcpy(to, &halves, sizeof halves);
#endif
}

template <class T>
void narrow(const float* from, int64_t size, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) narrow(load(from + i), to + i);
  for (; i < size; ++i) narrow(from[i], to + i);
}

inline Vec<float> widen(const float* p) { return load<float>(p); }

inline Vec<float> widen(const BFloat16* p) {
#if !defined(TOY_LM_PLAIN) && defined(__AVX512F__)  // gcc widens the two halves apart
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
  Half bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Vec<float>)(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
#endif
}

inline Vec<float> widen(const int8_t* p) {
#if !defined(TOY_LM_PLAIN) && defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  typedef int8_t Small __attribute__((vector_size(kLanes)));
  Small numbers;
  std::memcpy(&numbers, p, sizeof numbers);
  return __builtin_convertvector(numbers, Vec<float>);
#endif
}

// The sum of x's lanes: halves added to halves, which takes a few vector operations where lane by lane takes kLanes.
template <int kWide>
inline float sum_of(const float* x) {
  if constexpr (kWide == 1) {
    return x[0];
  } else {
    float folded[kWide / 2];
    for (int i = 0; i < kWide / 2; ++i) folded[i] = x[i] + x[i + kWide / 2];
    return sum_of<kWide / 2>(folded);
  }
}

inline float total(Vec<float> x) {
#if !defined(TOY_LM_PLAIN) && defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float lanes[kLanes];
  store(lanes, x);
  return sum_of<kLanes>(lanes);
#endif
}

inline float largest_lane(Vec<float> x) {
#if !defined(TOY_LM_PLAIN) && defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  return max_lanes<float>(x);
#endif
}

// The sums of the lanes of kLanes vectors at once, as the lanes of one, each in the order of `total`.
template <int kStep, size_t... kLane>
inline Vec<float> fold(Vec<float> x, Vec<float> y, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(x, y, int(kLane / kStep * 2 * kStep + kLane % kStep)...) +
         __builtin_shufflevector(x, y, int(kLane / kStep * 2 * kStep + kLane % kStep + kStep)...);
}

template <int kStep = kLanes / 2>
inline Vec<float> totals(const Vec<float>* x) {  // 2 kStep vectors, folded in pairs until one is left
  Vec<float> folded[kStep];
  for (int i = 0; i < kStep; ++i) folded[i] = fold<kStep>(x[2 * i], x[2 * i + 1], std::make_index_sequence<kLanes>{});
  if constexpr (kStep == 1) {
    return folded[0];
  } else {
    return totals<kStep / 2>(folded);
  }
}

template <class T>
float dot(const T* w, const float* x, int64_t size) {
  Vec<float> sum = broadcast(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) sum += widen(w + i) * load(x + i);
  float rest = total(sum);
  for (; i < size; ++i) rest += to_float(w[i]) * x[i];
  return rest;
}

// out = x / rms(x) * scale
template <class T>
void norm(const float* x, const T* scale, int64_t size, double eps, float* out) {
  const float squares = dot(x, x, size);
  const float factor = 1.0f / std::sqrt(squares / float(size) + float(eps));
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, load(x + i) * factor * widen(scale + i));
  for (; i < size; ++i) out[i] = x[i] * factor * to_float(scale[i]);
}

// What a matrix is multiplied with: x [batch][size], normalised first where there is a scale.
template <class T>
struct Input {
  const float* x;
  const T* norm_scale = nullptr;
  double norm_eps = 0.0;

  const float* normalised(int64_t batch, int64_t size, std::vector<float>& room) const {
    if (!norm_scale) return x;
    room.resize(batch * size);
    for (int64_t b = 0; b < batch; ++b) norm(x + b * size, norm_scale, size, norm_eps, &room[b * size]);
    return room.data();
  }
};

// A matrix of the model: [rows][size], or packed, [rows / lanes][size / depth][lanes][depth].
struct Matrix {
  const void* data;
  int64_t rows, size, lanes = 1, depth = 1;

  Matrix(const Tensor& w, int64_t layer, int64_t element_bytes) {
    const int64_t dims = w.dim();
    rows = w.size(dims - 2), size = w.size(dims - 1);
    if (dims > 3) {
      lanes = rows, depth = size;
      rows = w.size(dims - 4) * lanes, size = w.size(dims - 3) * depth;
    }
    data = static_cast<const char*>(w.const_data_ptr()) + layer * rows * size * element_bytes;
  }
};

// Products with packed weights. A step takes the kDepth columns of kLanes rows that lie together as kParts vectors, and
// multiplies each by an activation of its own.
template <class W>
constexpr int kDepth = sizeof(W) == 4 ? 1 : 2;

template <class W>
struct Widened {
  using Weight = W;
  using Activation = float;
  using Part = Vec<float>;
  static constexpr int kParts = kDepth<W>;
  static constexpr int64_t kRun = 16;  // steps that are added up by themselves, so that fewer roundings pile up

  static void load_step(const float* w, Part* parts) { parts[0] = load(w); }
  static void load_step(const BFloat16* w, Part* parts) {
    Vec<uint32_t> both;
    std::memcpy(&both, w, sizeof both);
    parts[0] = (Part)(both << 16);
    parts[1] = (Part)(both & 0xffff0000u);
  }
  static void load_step(const int8_t* w, Part* parts) {
    typedef int16_t Both __attribute__((vector_size(kLanes * 2)));
    Both both;
    std::memcpy(&both, w, sizeof both);
    const Bits<float> wide = __builtin_convertvector(both, Bits<float>);
    parts[0] = __builtin_convertvector((wide << 24) >> 24, Part);
    parts[1] = __builtin_convertvector(wide >> 8, Part);
  }
  static const float* activations(const float* x, int64_t, std::vector<float>&) { return x; }
  static Vec<float> add(Vec<float> sum, Part w, float x) { return sum + w * x; }
};

#if defined(TOY_LM_BF16_PAIRS)
template <class W>
struct Paired {
  using Weight = W;
  using Activation = uint32_t;  // two, as bf16
  using Part = __m512bh;
  static constexpr int kParts = 1;
  static constexpr int64_t kRun = 1 << 20;  // fp32 sums of what was rounded to bf16

  static void load_step(const BFloat16* w, Part* parts) { parts[0] = (Part)_mm512_loadu_si512(w); }
  static void load_step(const int8_t* w, Part* parts) {
    parts[0] = _mm512_cvtne2ps_pbh((__m512)widen(w + kLanes), (__m512)widen(w));
  }
  static const uint32_t* activations(const float* x, int64_t size, std::vector<uint32_t>& rounded) {
    rounded.resize(size / 2);
    narrow(x, size, reinterpret_cast<BFloat16*>(rounded.data()));
    return rounded.data();
  }
  static Vec<float> add(Vec<float> sum, Part w, uint32_t x) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, w, (Part)_mm512_set1_epi32(int(x)));
  }
};
#endif

// Row n of a matrix that may be packed.
template <class W>
void copy_row(const Matrix& matrix, int64_t n, float* to) {
  const W* row = static_cast<const W*>(matrix.data) + n / matrix.lanes * matrix.lanes * matrix.size;
  if (matrix.lanes == 1) {
    for (int64_t i = 0; i < matrix.size; ++i) to[i] = to_float(row[i]);
    return;
  }
  row += n % kLanes * kDepth<W>;
  for (int64_t i = 0; i < matrix.size; i += kDepth<W>, row += kLanes * kDepth<W>)
    for (int j = 0; j < kDepth<W>; ++j) to[i + j] = to_float(row[j]);
}

// out[r * batch + c] = w[r] . x[c] for kBlocks blocks of kLanes rows and kC sequences. The block `next` is asked for
// meanwhile: a core that is busy with products does not run far enough ahead by itself.
template <class A, int kBlocks, int kC>
TOY_LM_NOINLINE void multiply_tile(const typename A::Weight* w, int64_t steps, const typename A::Activation* x,
                                   const typename A::Weight* next, int64_t batch, Vec<float>* out) {
  constexpr int64_t kStep = kLanes * kDepth<typename A::Weight>;
  for (int64_t begin = 0; begin < steps; begin += A::kRun) {
    Vec<float> sums[kBlocks][kC] = {};
    for (int64_t l = begin; l < std::min(steps, begin + A::kRun); ++l) {
      typename A::Part parts[kBlocks][A::kParts];
#pragma GCC unroll 8
      for (int r = 0; r < kBlocks; ++r) A::load_step(w + (r * steps + l) * kStep, parts[r]);
      __builtin_prefetch(next + l * kStep, 0, 2);
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c)
#pragma GCC unroll 2
        for (int part = 0; part < A::kParts; ++part)
#pragma GCC unroll 8
          for (int r = 0; r < kBlocks; ++r)
            sums[r][c] = A::add(sums[r][c], parts[r][part], x[(c * steps + l) * A::kParts + part]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kBlocks; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) out[r * batch + c] = begin ? out[r * batch + c] + sums[r][c] : sums[r][c];
  }
}

// out[r * batch + b] with the products of the blocks from `block` on and the sequences from b on: kC at a time, then half
// as many.
template <class A, int kBlocks, int kC>
void multiply_blocks(const typename A::Weight* w, int64_t block, int64_t steps, const typename A::Activation* x,
                     int64_t b, int64_t batch, Vec<float>* out) {
  const int64_t size = steps * kLanes * kDepth<typename A::Weight>;  // of a block
  for (; b + kC <= batch; b += kC) {
    const int64_t next = block + (b / kC < kBlocks ? kBlocks + b / kC : 0);  // in later tiles they are on their way
    multiply_tile<A, kBlocks, kC>(w + block * size, steps, x + b * steps * A::kParts, w + next * size, batch, out + b);
  }
  if constexpr (kC > 1) multiply_blocks<A, kBlocks, kC / 2>(w, block, steps, x, b, batch, out);
}

// use(n, b, values) with the products of the rows n to n + kLanes - 1 and sequence b.
template <class A, class T, class F>
void multiply_packed(const Matrix& w, const Input<T>& input, int64_t batch, const F& use) {
  const int64_t blocks = w.rows / kLanes, steps = w.size / w.depth;
  const auto* weights = static_cast<const typename A::Weight*>(w.data);
  const int64_t grain = std::max<int64_t>(1, kGrain / (4 * kLanes * w.size));
  torch::stable::parallel_for(0, (blocks + 3) / 4, grain, [&](int64_t begin, int64_t end) {
    // Every thread normalises and rounds for itself: what another core did takes longer to fetch.
    std::vector<float> normed;
    const float* x = input.normalised(batch, w.size, normed);
    std::vector<typename A::Activation> rounded;
    const auto* columns = A::activations(x, batch * w.size, rounded);
    end = std::min(blocks, 4 * end);
    std::vector<Vec<float>> out(4 * batch);
    for (int64_t n = 4 * begin, count; n < end; n += count) {
      if (n + 4 <= end && batch < kColumns) {  // fewer sequences, more rows: sums enough to hide an addition's latency
        multiply_blocks<A, 4, kColumns / 2>(weights, n, steps, columns, 0, batch, out.data());
        count = 4;
      } else if (n + 2 <= end) {
        multiply_blocks<A, 2, kColumns>(weights, n, steps, columns, 0, batch, out.data());
        count = 2;
      } else {
        multiply_blocks<A, 1, kColumns>(weights, n, steps, columns, 0, batch, out.data());
        count = 1;
      }
      for (int64_t r = 0; r < count; ++r)
        for (int64_t b = 0; b < batch; ++b) use((n + r) * kLanes, b, out[r * batch + b]);
    }
  });
}

// The same with rows from `first` on that are not packed.
template <class W, class F>
void multiply_rows(const Matrix& w, int64_t first, const float* x, int64_t batch, const F& use) {
  if (first == w.rows) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / w.size);
  torch::stable::parallel_for(first, w.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t b = 0; b < batch; ++b)
        use(n, b, dot(static_cast<const W*>(w.data) + n * w.size, x + b * w.size, w.size));
  });
}

#if defined(TOY_LM_AMX)
// The same for bf16 weights with AMX: x is rounded to bf16, `pairs` has it as [size / 2][columns][2], and all sequences
// go through the tiles at once.
inline bool in_tiles(int64_t size) { return size % 32 == 0 && tiles_granted(); }

constexpr int64_t kPairRows = 32, kTransposed = 4;  // rows in a block; sequences that are worth a transposition

// use(n + r, b, products[r][b]) for products [rows][columns], `batch` columns of which count.
template <class F>
void use_block(const float* products, int64_t columns, int64_t n, int64_t rows, int64_t batch, const F& use) {
  if (batch < kTransposed) {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t r = 0; r < rows; ++r) use(n + r, b, products[r * columns + b]);
    return;
  }
  constexpr int64_t kAtOnce = 64;
  float by_sequence[kAtOnce * kPairRows];
  for (int64_t first = 0; first < batch; first += kAtOnce) {
    const int64_t count = std::min(kAtOnce, batch - first);
    transpose(products + first, columns, rows, count, by_sequence, kPairRows);
    for (int64_t b = 0; b < count; ++b)
      for (int64_t r = 0; r < rows; ++r) use(n + r, first + b, by_sequence[b * kPairRows + r]);
  }
}

// Up to 16 sequences fit a tile. One as narrow as they are takes less time to write, to hand to another core and to
// load: for a single sequence it is a sixteenth.
inline bool fits_a_tile(int64_t batch) { return batch <= 16; }

template <class F>
void multiply_in_a_tile(const BFloat16* w, int64_t begin, int64_t end, const uint32_t* pairs, int64_t batch,
                        int64_t size, const F& use) {
  // Tiles 0 and 1 hold the products of 16 rows each, 2 and 3 the rows, 4 the sequences.
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {16, 16, 16, 16, 16};
  } config;
  for (int tile : {0, 1, 4}) config.row_bytes[tile] = uint16_t(4 * batch);
  for (int tile : {2, 3}) config.row_bytes[tile] = 64;
  _tile_loadconfig(&config);
  float products[kPairRows * 16];
  for (int64_t n = begin; n < end; n += kPairRows) {
    const int64_t rows = std::min(kPairRows, end - n);
    const BFloat16 *first = w + n * size, *second = rows > 16 ? first + 16 * size : first;  // the last 16 may be alone
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t l = 0; l < size; l += 32) {
      _tile_loadd(4, pairs + l / 2 * batch, 4 * batch);
      _tile_loadd(2, first + l, 2 * size);
      _tile_dpbf16ps(0, 2, 4);
      _tile_loadd(3, second + l, 2 * size);
      _tile_dpbf16ps(1, 3, 4);
    }
    _tile_stored(0, products, 4 * batch);
    _tile_stored(1, products + 16 * batch, 4 * batch);
    asm volatile("" ::: "memory");  // the compiler does not know that tiles read and write memory
    use_block(products, batch, n, rows, batch, use);
  }
  _tile_release();
}

inline int64_t pair_columns(int64_t batch) { return fits_a_tile(batch) ? batch : (batch + 15) / 16 * 16; }

template <class F>
void multiply_pairs(const BFloat16* w, int64_t begin, int64_t end, const std::vector<uint32_t>& pairs, int64_t batch,
                    int64_t size, const F& use) {
  if (fits_a_tile(batch)) return multiply_in_a_tile(w, begin, end, pairs.data(), batch, size, use);
  const Bf16PairProducts::Session session;
  const int64_t columns = pair_columns(batch);
  std::vector<float> products(kPairRows * columns);
  for (int64_t n = begin; n < end; n += kPairRows) {
    const int64_t rows = std::min(kPairRows, end - n);
    Bf16PairProducts::multiply(rows, columns, size, {w + n * size, size, 1},
                               reinterpret_cast<const BFloat16*>(pairs.data()), columns, products.data(), columns,
                               true);
    use_block(products.data(), columns, n, rows, batch, use);
  }
}

void pack_pairs(const float* x, int64_t batch, int64_t size, std::vector<uint32_t>& pairs) {
  const int64_t columns = pair_columns(batch), half = size / 2;
  std::vector<uint32_t> by_sequence(batch * half);
  for (int64_t i = 0; i < batch * size; i += 32) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)load(x + i + 16), (__m512)load(x + i));
    std::memcpy(&by_sequence[i / 2], &both, sizeof both);
  }
  if (columns == 1) return pairs.swap(by_sequence);
  pairs.resize(half * columns + 16);  // `transpose` stores whole vectors, each over the end of the one before
  if (batch < kTransposed) {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < half; ++i) pairs[i * columns + b] = by_sequence[b * half + i];
  } else {
    transpose(by_sequence.data(), half, batch, half, pairs.data(), columns);
  }
}

template <class F>
void multiply_tiles(const Matrix& w, int64_t rows, const float* x, int64_t batch, const F& use) {
  std::vector<uint32_t> pairs;
  pack_pairs(x, batch, w.size, pairs);
  const int64_t tiles = (rows + kPairRows - 1) / kPairRows;
  const int64_t grain = std::max<int64_t>(1, 4 * kGrain / (kPairRows * w.size));  // these cost a quarter
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    multiply_pairs(static_cast<const BFloat16*>(w.data), begin * kPairRows, std::min(rows, end * kPairRows), pairs,
                   batch, w.size, use);
  });
}
#else
inline bool in_tiles(int64_t) { return false; }
#endif

// use(n, b, value) with the products of row n and sequence b, one or kLanes of them.
template <class W, class T, class F>
void multiply(const Matrix& w, const Input<T>& input, int64_t batch, const F& use) {
  if (w.lanes > 1) {
#if defined(TOY_LM_BF16_PAIRS)
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (Bf16PairProducts::worthwhile()) return multiply_packed<Paired<W>>(w, input, batch, use);
    }
#endif
    return multiply_packed<Widened<W>>(w, input, batch, use);
  }
  std::vector<float> normed;
  const float* x = input.normalised(batch, w.size, normed);
  int64_t first = 0;  // of the rows that are multiplied one by one
#if defined(TOY_LM_AMX)
  if constexpr (std::is_same_v<W, BFloat16>) {
    if (in_tiles(w.size)) {
      first = w.rows / 16 * 16;
      multiply_tiles(w, first, x, batch, use);
    }
  }
#endif
  multiply_rows<W>(w, first, x, batch, use);
}

// The same with the matrix of one layer, int8 where it has scales [num_layers][rows].
template <class T, class F>
void multiply(const Tensor& w, const OptionalTensor& scale, int64_t layer, const Input<T>& input, int64_t batch,
              const F& use) {
  if (!scale.has_value()) return multiply<T>(Matrix(w, layer, sizeof(T)), input, batch, use);
  const Matrix matrix(w, layer, sizeof(int8_t));
  const float* scales = data<float>(*scale) + layer * matrix.rows;
  multiply<int8_t>(matrix, input, batch, [&](int64_t n, int64_t b, auto value) {
    use(n, b, value * read<decltype(value)>(scales + n));
  });
}

inline float silu(float x) { return x / (1.0f + std::exp(-x)); }
inline Vec<float> silu(Vec<float> x) { return x / (1.0f + exp2(x * -float(kLog2E))); }

// hidden[b][n] = silu(gate) * up, from what the products left: [batch][2 rows], the gates before the ups.
void gate(const float* products, int64_t rows, int64_t batch, float* hidden) {
  torch::stable::parallel_for(0, batch, std::max<int64_t>(1, kGrain / rows), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const float *gates = products + b * 2 * rows, *ups = gates + rows;
      int64_t n = 0;
      for (; n + kLanes <= rows; n += kLanes) store(hidden + b * rows + n, silu(load(gates + n)) * load(ups + n));
      if (n == rows) continue;
      float last[2][kLanes] = {};
      std::copy(gates + n, gates + rows, last[0]);
      std::copy(ups + n, ups + rows, last[1]);
      store(last[0], silu(load(last[0])) * load(last[1]));
      std::copy(last[0], last[0] + (rows - n), hidden + b * rows + n);
    }
  });
}

// Turns each pair (x_i, x_{i + head_dim / 2}) by its angle.
void rotate(float* x, const float* cos, const float* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec<float> first = load(x + i), second = load(x + i + half);
    store(x + i, first * load(cos + i) - second * load(sin + i));
    store(x + i + half, second * load(cos + i) + first * load(sin + i));
  }
  for (; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cos[i] - second * sin[i];
    x[i + half] = second * cos[i] + first * sin[i];
  }
}

// Asks for what will be read: a sequence's keys are too few for a core to find out by itself.
template <class T>
inline void prefetch(const T* p, int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(p + i);
}

// softmax(q k^T / sqrt(head_dim)) v over the keys 0 to seqlen - 1; `p` has room for them, in whole vectors. `next_k` are
// keys that will be wanted next.
template <class T>
void attend(const float* q, const T* k, const T* v, const T* next_k, int64_t seqlen, int64_t head_dim, float* p,
            float* out) {
  const float scale = float(kLog2E) / std::sqrt(float(head_dim));
  for (int64_t key = 0; key < seqlen; key += kLanes) {  // as many keys at once as there are lanes for their scores
    const auto row = [&](int i) { return k + std::min(key + i, seqlen - 1) * head_dim; };
    Vec<float> sums[kLanes];
    for (int i = 0; i < kLanes; i += 4) {
      const T *row_0 = row(i), *row_1 = row(i + 1), *row_2 = row(i + 2), *row_3 = row(i + 3);
      Vec<float> sum_0{}, sum_1{}, sum_2{}, sum_3{};
      for (int64_t d = 0; d + kLanes <= head_dim; d += kLanes) {
        const Vec<float> q_d = load(q + d);
        sum_0 += widen(row_0 + d) * q_d;
        sum_1 += widen(row_1 + d) * q_d;
        sum_2 += widen(row_2 + d) * q_d;
        sum_3 += widen(row_3 + d) * q_d;
      }
      sums[i] = sum_0, sums[i + 1] = sum_1, sums[i + 2] = sum_2, sums[i + 3] = sum_3;
      prefetch(v + (key + i) * head_dim, 4 * head_dim);
    }
    store(p + key, totals(sums) * scale);
    for (int64_t d = head_dim / kLanes * kLanes; d < head_dim; ++d)
      for (int i = 0; i < kLanes; ++i) p[key + i] += scale * to_float(row(i)[d]) * q[d];
  }
  int64_t key = seqlen;
  for (; key % kLanes; ++key) p[key] = -std::numeric_limits<float>::infinity();
  Vec<float> largest = load(p), sums = broadcast(0.0f);
  for (int64_t j = kLanes; j < key; j += kLanes) largest = max<float>(largest, load(p + j));
  const float row_max = largest_lane(largest);
  for (int64_t j = 0; j < key; j += kLanes) {
    const Vec<float> weights = exp2(load(p + j) - row_max);
    sums += weights;
    store(p + j, weights);
  }
  const float row_sum = total(sums);
  const float factor = 1.0f / row_sum;
  int64_t d = 0;
  for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes) {
    Vec<float> sums[2][4] = {};  // even and odd keys apart, so that one addition does not wait for the other
    const T* column = v + d;
    int64_t j = 0;
    for (; j + 2 <= seqlen; j += 2) {
      for (int odd = 0; odd < 2; ++odd)
        for (int i = 0; i < 4; ++i) sums[odd][i] += widen(column + (j + odd) * head_dim + i * kLanes) * p[j + odd];
      for (int odd = 0; odd < 2; ++odd) prefetch(next_k + (j + odd) * head_dim + d, 4 * kLanes);
    }
    if (j < seqlen)
      for (int i = 0; i < 4; ++i) sums[0][i] += widen(column + j * head_dim + i * kLanes) * p[j];
    for (int i = 0; i < 4; ++i) store(out + d + i * kLanes, (sums[0][i] + sums[1][i]) * factor);
  }
  for (; d + kLanes <= head_dim; d += kLanes) {
    Vec<float> sums[4] = {};  // four chains of additions, so that one does not wait for the other
    int64_t j = 0;
    for (; j + 4 <= seqlen; j += 4)
      for (int i = 0; i < 4; ++i) sums[i] += widen(v + (j + i) * head_dim + d) * p[j + i];
    for (; j < seqlen; ++j) sums[0] += widen(v + j * head_dim + d) * p[j];
    store(out + d, ((sums[0] + sums[1]) + (sums[2] + sums[3])) * factor);
  }
  for (; d < head_dim; ++d) {
    float sum = 0.0f;
    for (int64_t j = 0; j < seqlen; ++j) sum += to_float(v[j * head_dim + d]) * p[j];
    out[d] = sum * factor;
  }
}

// The tensors of the op, and the sizes that follow from them.
struct Arguments {
  Tensor token_ids, positions, k_cache, v_cache, embedding, input_norm, qkv, q_norm, k_norm, o, post_norm, gate_up,
      down, final_norm, cos, sin;
  OptionalTensor qkv_scale, o_scale, gate_up_scale, down_scale;
  double norm_eps;

  int64_t num_layers() const { return k_cache.size(0); }
  int64_t batch() const { return token_ids.numel(); }  // tokens
  int64_t num_sequences() const { return k_cache.size(1); }
  int64_t num_kv_heads() const { return k_cache.size(2); }
  int64_t capacity() const { return k_cache.size(3); }
  int64_t head_dim() const { return k_cache.size(4); }
  int64_t num_heads() const { return Matrix(o, 0, 0).size / head_dim(); }
  int64_t model_dim() const { return Matrix(o, 0, 0).rows; }
  int64_t mlp_dim() const { return Matrix(down, 0, 0).size; }
};

// Pass 2: norms, rotation, cache and attention, from the projections qkv [batch][rows] to out [batch][heads *
// head_dim].
template <class T>
void attention_pass(const Arguments& a, int64_t layer, std::vector<float>& qkv, std::vector<float>& out) {
  const int64_t head_dim = a.head_dim(), kv_heads = a.num_kv_heads(), heads = a.num_heads(), groups = heads / kv_heads;
  const int64_t rows = (heads + 2 * kv_heads) * head_dim, capacity = a.capacity();
  T* k_cache = static_cast<T*>(a.k_cache.mutable_data_ptr());
  T* v_cache = static_cast<T*>(a.v_cache.mutable_data_ptr());
  const T* q_norm = data<T>(a.q_norm) + layer * head_dim;
  const T* k_norm = data<T>(a.k_norm) + layer * head_dim;
  const int64_t seqlen = a.batch() / a.num_sequences();
  const auto norm_and_rotate = [&](float* x, const T* scale, int64_t position) {
    norm(x, scale, head_dim, a.norm_eps, x);
    rotate(x, data<float>(a.cos) + position * (head_dim / 2), data<float>(a.sin) + position * (head_dim / 2), head_dim);
  };
  torch::stable::parallel_for(0, a.num_sequences() * kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> p(capacity + kLanes);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t first = pair / kv_heads * seqlen, kv_head = pair % kv_heads;
      T* keys = k_cache + (layer * a.num_sequences() * kv_heads + pair) * capacity * head_dim;
      T* values = v_cache + (layer * a.num_sequences() * kv_heads + pair) * capacity * head_dim;
      for (int64_t b = first; b < first + seqlen; ++b) {
        const int64_t position = data<int32_t>(a.positions)[b];
        float* k = &qkv[b * rows + (heads + kv_head) * head_dim];
        norm_and_rotate(k, k_norm, position);
        narrow(k, head_dim, keys + position * head_dim);
        narrow(k + kv_heads * head_dim, head_dim, values + position * head_dim);
        for (int64_t head = kv_head * groups; head < (kv_head + 1) * groups; ++head) {
          float* q = &qkv[b * rows + head * head_dim];
          norm_and_rotate(q, q_norm, position);
          attend(q, keys, values, keys + capacity * head_dim, position + 1, head_dim, p.data(),
                 &out[(b * heads + head) * head_dim]);
        }
      }
    }
  });
}

// Pass 4, from x to hidden [batch][mlp_dim].
template <class T>
void gate_pass(const Arguments& a, int64_t layer, const Input<T>& x, std::vector<float>& hidden) {
  const int64_t batch = a.batch(), mlp_dim = a.mlp_dim();
  if (Matrix(a.gate_up, 0, 0).lanes > 1) {  // a block of gates, then the block of ups that it is for
    multiply(a.gate_up, a.gate_up_scale, layer, x, batch, [&](int64_t n, int64_t b, auto value) {
      float* to = &hidden[b * mlp_dim + n / (2 * kLanes) * kLanes];
      write(to, n / kLanes % 2 ? silu(read<decltype(value)>(to)) * value : value);
    });
  } else {
    std::vector<float> gated(batch * 2 * mlp_dim);
    multiply(a.gate_up, a.gate_up_scale, layer, x, batch,
             [&](int64_t n, int64_t b, auto value) { write(&gated[b * 2 * mlp_dim + n], value); });
    gate(gated.data(), mlp_dim, batch, hidden.data());
  }
}

template <class T>
Tensor run(const Arguments& a) {
  const Matrix embedding(a.embedding, 0, sizeof(T));
  const int64_t batch = a.batch(), dim = a.model_dim(), vocab_size = embedding.rows;
  const int64_t attended = a.num_heads() * a.head_dim(), projected = Matrix(a.qkv, 0, 0).rows;
  std::vector<float> x(batch * dim), qkv(batch * projected), out(batch * attended), hidden(batch * a.mlp_dim());
  for (int64_t b = 0; b < batch; ++b)
    copy_row<T>(embedding, std::max<int64_t>(0, data<int64_t>(a.token_ids)[b]), &x[b * dim]);
  const auto normed = [&](const T* scale) { return Input<T>{x.data(), scale, a.norm_eps}; };
  const auto add = [&](int64_t n, int64_t b, auto value) {
    write(&x[b * dim + n], read<decltype(value)>(&x[b * dim + n]) + value);
  };
  for (int64_t layer = 0; layer < a.num_layers(); ++layer) {
    multiply(a.qkv, a.qkv_scale, layer, normed(data<T>(a.input_norm) + layer * dim), batch,
             [&](int64_t n, int64_t b, auto value) { write(&qkv[b * projected + n], value); });
    attention_pass<T>(a, layer, qkv, out);
    multiply(a.o, a.o_scale, layer, Input<T>{out.data()}, batch, add);
    gate_pass(a, layer, normed(data<T>(a.post_norm) + layer * dim), hidden);
    multiply(a.down, a.down_scale, layer, Input<T>{hidden.data()}, batch, add);
  }
  const int64_t sequences = a.num_sequences(), seqlen = batch / sequences;
  for (int64_t b = 0; b < sequences && seqlen > 1; ++b)  // their last tokens
    std::copy_n(&x[(b * seqlen + seqlen - 1) * dim], dim, &x[b * dim]);
  Tensor logits = torch::stable::new_empty(a.embedding, {sequences, vocab_size}, ScalarType::Float);
  float* written = static_cast<float*>(logits.mutable_data_ptr());
  multiply<T>(embedding, normed(data<T>(a.final_norm)), sequences,
              [&](int64_t n, int64_t b, auto value) { write(&written[b * vocab_size + n], value); });
  return logits;
}

Tensor decode_step(Tensor token_ids, Tensor positions, Tensor k_cache, Tensor v_cache, Tensor embedding,
                   Tensor input_norm, Tensor qkv, Tensor q_norm, Tensor k_norm, Tensor o, Tensor post_norm,
                   Tensor gate_up, Tensor down, Tensor final_norm, Tensor cos, Tensor sin, OptionalTensor qkv_scale,
                   OptionalTensor o_scale, OptionalTensor gate_up_scale, OptionalTensor down_scale, double norm_eps) {
  const Arguments a{token_ids, positions, k_cache,   v_cache,   embedding,     input_norm, qkv,
                    q_norm,    k_norm,    o,         post_norm, gate_up,       down,       final_norm,
                    cos,       sin,       qkv_scale, o_scale,   gate_up_scale, down_scale, norm_eps};
  const int64_t vocab_size = Matrix(embedding, 0, 0).rows;
  for (int64_t b = 0; b < a.batch(); ++b) {
    const int64_t position = data<int32_t>(positions)[b], token = data<int64_t>(token_ids)[b];
    STD_TORCH_CHECK(position >= 0 && position < std::min(a.capacity(), cos.size(0)), "positions: got ", position,
                    " for token ", b, ", allowed are 0 to ", std::min(a.capacity(), cos.size(0)) - 1);
    STD_TORCH_CHECK(token >= -1 && token < vocab_size, "token_ids: got ", token, " for token ", b,
                    ", allowed are -1 to ", vocab_size - 1);
  }
  return embedding.scalar_type() == ScalarType::Float ? run<float>(a) : run<BFloat16>(a);
}

// How many rows of this matrix [...][rows][size] should lie side by side.
int64_t rows_together(Tensor matrix) {
  return matrix.scalar_type() == ScalarType::BFloat16 && in_tiles(matrix.size(matrix.dim() - 1)) ? 1 : kLanes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kernels, CPU, m) {
  m.impl("decode_step", TORCH_BOX(&decode_step));
  m.impl("rows_together", TORCH_BOX(&rows_together));
}
