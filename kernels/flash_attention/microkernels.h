// Register-blocked matrix products, transposes and vector functions of the CPU attention kernels.
//
// One source serves every instruction set through the compilers' vector extension: a Vec<float> is 16 floats with
// AVX-512, 8 with AVX2, 4 with NEON and SSE. TOY_LM_PLAIN keeps to what every machine of the architecture has.
//
// A product is C [rows][columns] = A B with A the "left" and B the "right" operand. A's elements are broadcast, B's
// lie side by side in vectors. How operands lie in memory is the business of an arithmetic:
//
//   Plain<float>, Plain<double>   left: any strides           right: [depth][columns]          fused multiply-add
//   Bf16Pairs<kBlockM>            left: [rows][depth] bf16    right: [depth / 2][columns][2]   AMX tiles, or
//   AVX512_BF16
//
// Knows vectors and small matrices; knows nothing of attention, tensors or threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if !defined(TOY_LM_PLAIN) && defined(__x86_64__)
#include <immintrin.h>
#if defined(__AMX_BF16__) && defined(__linux__)
#define TOY_LM_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

// For functions that loop: inlined into every caller they would only make the build slow.
#define TOY_LM_NOINLINE __attribute__((noinline))

namespace {

// Vectors

#if defined(TOY_LM_PLAIN)
constexpr int kVectorBytes = 16, kRegisters = 16;
#elif defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

template <class E>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<uint32_t> {
  typedef uint32_t type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <class E>
using Vec = typename VectorOf<E>::type;
template <class E>
using Bits = typename VectorOf<E>::bits;

template <class E>
constexpr int kWidth = kVectorBytes / sizeof(E);  // elements in a vector

template <class E>
inline Vec<E> load(const E* p) {  // any alignment
  Vec<E> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <class E>
inline void store(E* p, Vec<E> x) {
  std::memcpy(p, &x, sizeof x);
}

template <class E>
inline Vec<E> broadcast(E x) {
  return x - Vec<E>{};
}

// x, held in a register. GCC would read it from memory again for every use, as slowly as it multiplies.
template <class V>
inline V keep(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

template <class E>
inline Vec<E> select(Bits<E> condition, Vec<E> yes, Vec<E> no) {
  return condition ? yes : no;
}

// The greater of two, and NaN where the second is NaN.
template <class E>
inline Vec<E> max(Vec<E> x, Vec<E> y) {
#if !defined(TOY_LM_PLAIN) && defined(__AVX512F__)
  if constexpr (sizeof(E) == 4) return (Vec<E>)_mm512_max_ps((__m512)x, (__m512)y);
#elif !defined(TOY_LM_PLAIN) && defined(__AVX__)
  if constexpr (sizeof(E) == 4) return (Vec<E>)_mm256_max_ps((__m256)x, (__m256)y);
#endif
  return x > y ? x : y;
}

template <class E>
inline bool any(Bits<E> condition) {
  typename std::remove_reference<decltype(condition[0])>::type sum = 0;
  for (int i = 0; i < kWidth<E>; ++i) sum |= condition[i];
  return sum != 0;
}

// Both fold the vector in half until one lane is left.
template <class E>
inline E sum_lanes(Vec<E> x) {
  E lanes[kWidth<E>];
  store(lanes, x);
#pragma GCC unroll 8
  for (int step = kWidth<E> / 2; step > 0; step /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

template <class E>
inline E max_lanes(Vec<E> x) {  // NaN if there is one
  E lanes[kWidth<E>];
  store(lanes, x);
#pragma GCC unroll 8
  for (int step = kWidth<E> / 2; step > 0; step /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < step; ++i) {
      const E other = lanes[i + step];
      lanes[i] = other > lanes[i] || other != other ? other : lanes[i];
    }
  return lanes[0];
}

// Functions

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// 2^x = 2^n 2^r with n the integer nearest to x and |r| <= 1/2. The polynomial for 2^r is the minimax one of degree 5
// (relative error 2^-23.1); with rounding, exp2 is within 2.5 units in the last place. It is exact at r = 0. Below x =
// -127 the result is 0 (between -127 and -126, smaller than the smallest normal number), so that exp2(-inf) = 0; NaN
// stays NaN.
constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction

inline Vec<float> exp2(Vec<float> x) {
  x = max<float>(broadcast(-127.0f), x);
  const Vec<float> shifted = x + kRoundToInteger;
  const Vec<float> r = x - (shifted - kRoundToInteger);
  Vec<float> y = broadcast(1.326472731e-03f);
  y = y * r + 9.671512991e-03f;
  y = y * r + 5.550733581e-02f;
  y = y * r + 2.402224243e-01f;
  y = y * r + 6.931470037e-01f;
  y = y * r + 1.0f;
  return (Vec<float>)((Bits<float>)y + ((Bits<float>)shifted << 23));
}

// The same with degree 3 (relative error 2^-13.2), for results that are rounded to bf16's 8 bits at once. AVX-512
// splits x into a whole number and a fraction from 0 to 1, and multiplies by 2^n, in an instruction each; results below
// the smallest normal number, which would take it a hundred times as long, are 0.
#if !defined(TOY_LM_PLAIN) && defined(__AVX512DQ__)
inline Vec<float> exp2_rough(Vec<float> x) {
  const Vec<float> r = (Vec<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec<float> y = broadcast(7.706716e-02f);
  y = y * r + 2.276448e-01f;
  y = y * r + 6.951168e-01f;
  y = y * r + 1.0f;
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)y, (__m512)x);
}
#else
inline Vec<float> exp2_rough(Vec<float> x) {
  x = max<float>(broadcast(-127.0f), x);
  const Vec<float> shifted = x + kRoundToInteger;
  const Vec<float> r = x - (shifted - kRoundToInteger);
  Vec<float> y = broadcast(5.500893295e-02f);
  y = y * r + 2.422109693e-01f;
  y = y * r + 6.932829022e-01f;
  y = y * r + 1.0f;
  return (Vec<float>)((Bits<float>)y + ((Bits<float>)shifted << 23));
}
#endif

inline Vec<double> exp2(Vec<double> x) {
  Vec<double> y{};
  for (int i = 0; i < kWidth<double>; ++i) y[i] = std::exp2(x[i]);
  return y;
}

// tanh(x) = e / (e + 2) with e = exp(2 x) - 1 = 2^n (2^r - 1) + (2^n - 1), which has no cancellation near 0. The
// polynomial for 2^r - 1 is the minimax one of degree 6; it must be good relative to 2^r - 1, and so better than the
// one of exp2.
inline Vec<float> tanh(Vec<float> x) {
  Vec<float> z = x * static_cast<float>(2.0 * kLog2E);
  z = select<float>(z < -40.0f, broadcast(-40.0f), z);  // tanh is -1 or 1 there, to the last bit
  z = select<float>(z > 40.0f, broadcast(40.0f), z);
  const Vec<float> shifted = z + kRoundToInteger;
  const Vec<float> r = z - (shifted - kRoundToInteger);
  const Vec<float> power = (Vec<float>)((Bits<float>)broadcast(1.0f) + ((Bits<float>)shifted << 23));  // 2^n
  Vec<float> y = broadcast(1.535336196e-04f);
  y = y * r + 1.339887502e-03f;
  y = y * r + 9.618436918e-03f;
  y = y * r + 5.550332367e-02f;
  y = y * r + 2.402264774e-01f;
  y = y * r + 6.931471825e-01f;
  const Vec<float> e = power * (y * r) + (power - 1.0f);
  return e / (e + 2.0f);
}

inline Vec<double> tanh(Vec<double> x) {
  Vec<double> y{};
  for (int i = 0; i < kWidth<double>; ++i) y[i] = std::tanh(x[i]);
  return y;
}

// Natural logarithm of a positive normal number m 2^e: 2 artanh(t) + e log 2 with t = (m - 1) / (m + 1) and m from
// sqrt(1/2) to sqrt(2), where the series to t^9 has a relative error of 2^-28. Infinity and NaN stay what they are.
inline Vec<float> log(Vec<float> x) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const Bits<float> exponent = ((Bits<float>)x - kSqrtHalf) >> 23;
  const Vec<float> m = (Vec<float>)((Bits<float>)x - (exponent << 23));
  const Vec<float> t = (m - 1.0f) / (m + 1.0f), u = t * t;
  Vec<float> y = broadcast(2.0f / 9.0f);
  y = y * u + 2.0f / 7.0f;
  y = y * u + 2.0f / 5.0f;
  y = y * u + 2.0f / 3.0f;
  y = y * u + 2.0f;
  y = __builtin_convertvector(exponent, Vec<float>) * static_cast<float>(kLn2) + y * t;
  return select<float>(x < std::numeric_limits<float>::infinity(), y, x);
}

inline Vec<double> log(Vec<double> x) {
  Vec<double> y{};
  for (int i = 0; i < kWidth<double>; ++i) y[i] = std::log(x[i]);
  return y;
}

// Transposes

// Lane i is lane source(i) of x, or of y where that is kWidth or more.
template <class E, class Source, size_t... kLane>
inline Vec<E> shuffle(Vec<E> x, Vec<E> y, Source, std::index_sequence<kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, Source{}(kLane)...);
#else
  return __builtin_shuffle(x, y, Bits<E>{Source{}(kLane)...});
#endif
}

// From rows i (x) and i + kStep (y) of 2 kStep x 2 kStep squares: what row i holds (kUpper), or row i + kStep, once the
// off-diagonal kStep x kStep squares have changed places.
template <class E, int kStep, bool kUpper>
inline Vec<E> exchange(Vec<E> x, Vec<E> y) {
  constexpr int W = kWidth<E>;
  constexpr auto source = [](int lane) {
    return kUpper ? ((lane & kStep) ? W + (lane ^ kStep) : lane) : ((lane & kStep) ? W + lane : (lane ^ kStep));
  };
  return shuffle<E>(x, y, source, std::make_index_sequence<W>());
}

// From x where lane & kStep is 0 and from y elsewhere: the lane itself, or (kCross) the one kStep away.
template <class E, int kStep, bool kCross>
inline Vec<E> merge(Vec<E> x, Vec<E> y) {
  constexpr int W = kWidth<E>;
  constexpr auto source = [](int lane) { return (lane & kStep ? W : 0) + (kCross ? lane ^ kStep : lane); };
  return shuffle<E>(x, y, source, std::make_index_sequence<W>());
}

// Transposes squares of kEnd vectors by rounds of such exchanges, kStep = 1, 2, 4...
template <class E, int kStep, int kEnd>
inline void transpose_square(Vec<E>* rows) {
  constexpr int W = kWidth<E>;
  if constexpr (kStep < kEnd) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & kStep) continue;
      const Vec<E> x = rows[i], y = rows[i | kStep];
      rows[i] = exchange<E, kStep, true>(x, y);
      rows[i | kStep] = exchange<E, kStep, false>(x, y);
    }
    transpose_square<E, kStep * 2, kEnd>(rows);
  }
}

// Four 32-bit elements at p, at p + step, at p + 2 step...
template <class E>
inline Vec<E> load_fours(const E* p, [[maybe_unused]] int64_t step) {
#if !defined(TOY_LM_PLAIN) && defined(__AVX2__)
  const auto four = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * step)); };
#if defined(__AVX512F__)
  __m512i x = _mm512_inserti32x4(_mm512_castsi128_si512(four(0)), four(1), 1);
  x = _mm512_inserti32x4(_mm512_inserti32x4(x, four(2), 2), four(3), 3);
  return (Vec<E>)x;
#else
  return (Vec<E>)_mm256_inserti128_si256(_mm256_castsi128_si256(four(0)), four(1), 1);
#endif
#else
  return load(p);
#endif
}

// rows[c] lane r = from[r][c], for a square. Squares of four by four change places while they are loaded, which costs
// less than an exchange.
template <class E>
inline void load_transposed(const E* from, int64_t from_row, Vec<E>* rows) {
  constexpr int W = kWidth<E>;
  if constexpr (sizeof(E) == 4) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = load_fours(from + i % 4 * from_row + i / 4 * 4, 4 * from_row);
    transpose_square<E, 1, 4>(rows);
  } else {
    for (int i = 0; i < W; ++i) rows[i] = load(from + i * from_row);
    transpose_square<E, 1, W>(rows);
  }
}

// Lane i becomes the sum of the lanes of rows[i].
template <class E, int kStep>
inline Vec<E> sum_rows(Vec<E>* rows) {
  constexpr int W = kWidth<E>;
  if constexpr (kStep < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * kStep)
      rows[i] = merge<E, kStep, false>(rows[i], rows[i + kStep]) + merge<E, kStep, true>(rows[i], rows[i + kStep]);
    return sum_rows<E, kStep * 2>(rows);
  } else {
    return rows[0];
  }
}

// to[c][r] = from[r][c] for r < rows, c < columns. In each row of `to`, up to the next whole vector, zeros follow.
template <class E>
TOY_LM_NOINLINE void transpose(const E* from, int64_t from_row, int64_t rows, int64_t columns, E* to, int64_t to_row) {
  constexpr int W = kWidth<E>;
  Vec<E> tile[W];
  E edge[W * W];  // a square that is not whole
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < columns; c += W) {
      const int64_t in_column = rows - r < W ? rows - r : W, in_row = columns - c < W ? columns - c : W;
      if (in_column == W && in_row == W) {
        load_transposed(from + r * from_row + c, from_row, tile);
      } else {
        std::memset(edge, 0, sizeof edge);
        for (int64_t i = 0; i < in_column; ++i)
          std::memcpy(edge + i * W, from + (r + i) * from_row + c, in_row * sizeof(E));
        load_transposed(edge, W, tile);
      }
      for (int64_t i = 0; i < in_row; ++i) store(to + (c + i) * to_row + r, tile[i]);
    }
}

// Products in fp32 or fp64

template <class E>
struct Left {
  const E* data;
  int64_t row_stride, depth_stride;

  Left from_row(int64_t i) const { return {data + i * row_stride, row_stride, depth_stride}; }
  Left from_depth(int64_t l) const { return {data + l * depth_stride, row_stride, depth_stride}; }
};

template <class A>
struct Plain {
  using Element = A;
  using Accumulator = A;
  static constexpr int64_t kBlockM = 64;         // queries in a block: the lanes of a right operand
  static constexpr int64_t kMaskedColumns = 16;  // so many of them at a time in a masked tile
  static constexpr int64_t kDepthUnit = 1;       // depths and left rows are padded to multiples of these
  static constexpr int64_t kRowUnit = 1;
  static constexpr int64_t kPairing = 1;  // elements in a row of a right operand, for each column
  struct Session {};
  static Vec<A> weight(Vec<A> x) { return exp2(x); }

  // c += a b, or c = a b if `fresh`, for kRows rows and kVectors vectors of columns.
  template <int kRows, int kVectors>
  static inline void tile(int64_t depth, const Left<A>& a, const A* b, int64_t b_row, A* c, int64_t c_row, bool fresh) {
    constexpr int W = kWidth<A>;
    Vec<A> acc[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[i][j] = fresh ? Vec<A>{} : load(c + i * c_row + j * W);
    for (int64_t l = 0; l < depth; ++l) {
      Vec<A> b_l[kVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) b_l[j] = load(b + l * b_row + j * W);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Vec<A> a_il = broadcast(a.data[i * a.row_stride + l * a.depth_stride]);
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) acc[i][j] += a_il * b_l[j];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) store(c + i * c_row + j * W, acc[i][j]);
  }

  template <int kVectors>
  static void panel(int64_t rows, int64_t depth, Left<A> a, const A* b, int64_t b_row, A* c, int64_t c_row,
                    bool fresh) {
    constexpr int kRows =
        kRegisters == 32 ? kVectors < 4 ? 8 : 6 : 4;  // enough sums in flight to hide the latency of an addition
    for (; rows >= kRows; rows -= kRows, a.data += kRows * a.row_stride, c += kRows * c_row)
      tile<kRows, kVectors>(depth, a, b, b_row, c, c_row, fresh);
    if (kRows > 4 && rows >= 4) {
      tile<4, kVectors>(depth, a, b, b_row, c, c_row, fresh);
      rows -= 4;
      a.data += 4 * a.row_stride;
      c += 4 * c_row;
    }
    for (; rows > 0; --rows, a.data += a.row_stride, c += c_row) tile<1, kVectors>(depth, a, b, b_row, c, c_row, fresh);
  }

  // c [rows][columns] (+)= a [rows][depth] b [depth][columns]; columns is a multiple of the vector width.
  TOY_LM_NOINLINE static void multiply(int64_t rows, int64_t columns, int64_t depth, const Left<A>& a, const A* b,
                                       int64_t b_row, A* c, int64_t c_row, bool fresh) {
    constexpr int W = kWidth<A>, kVectors = kRegisters == 32 ? 4 : 2;
    int64_t j = 0;
    if constexpr (std::is_same_v<A, float>) {  // fp64 is for checking gradients: less code for it
      for (; j + kVectors * W <= columns; j += kVectors * W)
        panel<kVectors>(rows, depth, a, b + j, b_row, c + j, c_row, fresh);
      if constexpr (kVectors > 3)
        if (j + 3 * W <= columns) {
          panel<3>(rows, depth, a, b + j, b_row, c + j, c_row, fresh);
          j += 3 * W;
        }
      if (kVectors > 2 && j + 2 * W <= columns) {
        panel<2>(rows, depth, a, b + j, b_row, c + j, c_row, fresh);
        j += 2 * W;
      }
    }
    for (; j < columns; j += W) panel<1>(rows, depth, a, b + j, b_row, c + j, c_row, fresh);
  }
};

// Products of bf16 pairs, added up in fp32

struct BFloat16 {
  uint16_t bits;
};

#if !defined(TOY_LM_PLAIN) && defined(__AVX512BF16__)
#define TOY_LM_BF16_PAIRS 1

// Rounds to nearest, ties to even; numbers below the smallest normal one become 0.
inline void store_rounded(BFloat16* to, Vec<float> x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

// sum += x y, for the pairs of each lane.
inline Vec<float> dot_pairs(Vec<float> sum, Vec<uint32_t> x, Vec<uint32_t> y) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}

#if defined(TOY_LM_AMX)
// Linux hands out the tile registers on request, once per process.
inline bool tiles_granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
#endif

struct Bf16PairProducts {
  using Element = BFloat16;
  using Accumulator = float;
  static constexpr int64_t kDepthUnit = 32;
  static constexpr int64_t kRowUnit = 16;
  static constexpr int64_t kPairing = 2;
  static Vec<float> weight(Vec<float> x) { return exp2_rough(x); }

  // Does this machine multiply pairs faster than floats? With AMX it does, and on AMD's cores; on Intel's, AVX512_BF16
  // alone is slower than fused multiply-add.
  static bool worthwhile() {
#if defined(TOY_LM_FORCE_BF16_PAIRS)
    return true;
#else
#if defined(TOY_LM_AMX)
    if (tiles_granted()) return true;
#endif
    return __builtin_cpu_is("amd");
#endif
  }

#if defined(TOY_LM_AMX)
  // While one lives, the thread's eight tile registers are 16 rows of 64 bytes each.
  struct Session {
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      if (tiles_granted()) _tile_loadconfig(&config);
    }
    ~Session() {
      if (tiles_granted()) _tile_release();
    }
  };

  // c [16 kRows][16 kColumns] (+)= a b. Tiles 0 to 3 hold c, 4 and 5 hold a, 6 and 7 hold b.
  template <int kRows, int kColumns>
  static inline void tile(int64_t depth, const Left<BFloat16>& a, const BFloat16* b, int64_t b_row, float* c,
                          int64_t c_row, bool fresh) {
    const int64_t a_bytes = a.row_stride * 2, b_bytes = b_row * 4, c_bytes = c_row * 4;
    const BFloat16* a_1 = a.data + 16 * a.row_stride;
    const BFloat16* b_1 = b + 32;
    float* c_1 = c + 16 * c_row;
    if (fresh) {
      _tile_zero(0);
      if constexpr (kColumns == 2) _tile_zero(1);
      if constexpr (kRows == 2) _tile_zero(2);
      if constexpr (kRows == 2 && kColumns == 2) _tile_zero(3);
    } else {
      _tile_loadd(0, c, c_bytes);
      if constexpr (kColumns == 2) _tile_loadd(1, c + 16, c_bytes);
      if constexpr (kRows == 2) _tile_loadd(2, c_1, c_bytes);
      if constexpr (kRows == 2 && kColumns == 2) _tile_loadd(3, c_1 + 16, c_bytes);
    }
    for (int64_t l = 0; l < depth; l += 32) {
      _tile_loadd(4, a.data + l, a_bytes);
      _tile_loadd(6, b + l * b_row, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kColumns == 2) {
        _tile_loadd(7, b_1 + l * b_row, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kRows == 2) {
        _tile_loadd(5, a_1 + l, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (kRows == 2 && kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (kColumns == 2) _tile_stored(1, c + 16, c_bytes);
    if constexpr (kRows == 2) _tile_stored(2, c_1, c_bytes);
    if constexpr (kRows == 2 && kColumns == 2) _tile_stored(3, c_1 + 16, c_bytes);
  }

  template <int kColumns>
  static void panel(int64_t rows, int64_t depth, Left<BFloat16> a, const BFloat16* b, int64_t b_row, float* c,
                    int64_t c_row, bool fresh) {
    for (; rows >= 32; rows -= 32, a.data += 32 * a.row_stride, c += 32 * c_row)
      tile<2, kColumns>(depth, a, b, b_row, c, c_row, fresh);
    if (rows > 0) tile<1, kColumns>(depth, a, b, b_row, c, c_row, fresh);
  }

  TOY_LM_NOINLINE static void multiply_tiles(int64_t rows, int64_t columns, int64_t depth, const Left<BFloat16>& a,
                                             const BFloat16* b, int64_t b_row, float* c, int64_t c_row, bool fresh) {
    asm volatile("" ::: "memory");  // the compiler does not know that tile loads read memory
    int64_t j = 0;
    for (; j + 32 <= columns; j += 32) panel<2>(rows, depth, a, b + 2 * j, b_row, c + j, c_row, fresh);
    if (j < columns) panel<1>(rows, depth, a, b + 2 * j, b_row, c + j, c_row, fresh);
    asm volatile("" ::: "memory");
  }
#else
  struct Session {};
#endif

  template <int kRows, int kVectors>
  static inline void dot_tile(int64_t depth, const Left<BFloat16>& a, const BFloat16* b, int64_t b_row, float* c,
                              int64_t c_row, bool fresh) {
    __m512 acc[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j)
        acc[i][j] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(c + i * c_row + j * 16);
    for (int64_t l = 0; l < depth; l += 2) {
      __m512bh b_l[kVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) b_l[j] = (__m512bh)_mm512_loadu_si512(b + l * b_row + j * 32);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        int32_t pair;
        std::memcpy(&pair, a.data + i * a.row_stride + l, sizeof pair);
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j)
          acc[i][j] = _mm512_dpbf16_ps(acc[i][j], (__m512bh)_mm512_set1_epi32(pair), b_l[j]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) _mm512_storeu_ps(c + i * c_row + j * 16, acc[i][j]);
  }

  // c [rows][columns] (+)= a [rows][depth] b [depth / 2][columns][2]; rows and columns are multiples of 16, depth
  // of 32.
  TOY_LM_NOINLINE static void multiply(int64_t rows, int64_t columns, int64_t depth, const Left<BFloat16>& a,
                                       const BFloat16* b, int64_t b_row, float* c, int64_t c_row, bool fresh) {
#if defined(TOY_LM_AMX)
    if (tiles_granted()) return multiply_tiles(rows, columns, depth, a, b, b_row, c, c_row, fresh);
#endif
    int64_t j = 0;
    for (; j + 64 <= columns; j += 64)
      for (int64_t i = 0; i < rows; i += 4)
        dot_tile<4, 4>(depth, {a.data + i * a.row_stride, a.row_stride, 1}, b + 2 * j, b_row, c + i * c_row + j, c_row,
                       fresh);
    for (; j < columns; j += 16)
      for (int64_t i = 0; i < rows; i += 8)
        dot_tile<8, 1>(depth, {a.data + i * a.row_stride, a.row_stride, 1}, b + 2 * j, b_row, c + i * c_row + j, c_row,
                       fresh);
  }
};

// Products are so fast here that the cache decides: with 32 queries, what the forward pass needs stays in 48 KB, while
// the backward pass gains more from reading K and V half as often (forward 555 against 425 GFLOP/s on one core of a
// Xeon with AMX, backward 505 against 565; 1024 queries and keys, head_dim 64).
template <int64_t kQueries>
struct Bf16Pairs : Bf16PairProducts {
  static constexpr int64_t kBlockM = kQueries;
  static constexpr int64_t kMaskedColumns = 32;
};
#endif

// Two fp32 vectors as bf16 pairs: x in the lower halves, y in the upper ones. Rounds to nearest, ties away from 0.
inline Vec<uint32_t> to_pairs(Vec<float> x, Vec<float> y) {
  const Vec<uint32_t> low = (Vec<uint32_t>)x + 0x8000u, high = (Vec<uint32_t>)y + 0x8000u;
  return (low >> 16) | (high & 0xffff0000u);
}

}  // namespace
