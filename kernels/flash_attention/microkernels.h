// Register-blocked products and vector functions of the CPU attention kernels.
//
// One source serves every instruction set through the compiler's vector extension: a Vec<float> is 16 floats with
// AVX-512, 8 with AVX2, 4 with NEON and SSE. TOY_LM_PLAIN keeps to what every machine of the architecture has.
//
// Knows vectors and small matrices; knows nothing of attention, tensors or threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

#if defined(TOY_LM_PLAIN)
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#elif defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <class A>
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
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
using Bits = typename VectorOf<A>::bits;

template <class A>
constexpr int kWidth = kVectorBytes / sizeof(A);  // elements in a vector

template <class A>
inline Vec<A> load(const A* p) {  // any alignment
  Vec<A> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <class A>
inline void store(A* p, Vec<A> x) {
  std::memcpy(p, &x, sizeof x);
}

template <class A>
inline Vec<A> broadcast(A x) {
  return x - Vec<A>{};
}

template <class A>
inline Vec<A> select(Bits<A> condition, Vec<A> yes, Vec<A> no) {
  return condition ? yes : no;
}

// The greater of two, and NaN where the second is NaN.
template <class A>
inline Vec<A> max(Vec<A> x, Vec<A> y) {
  return x > y ? x : y;
}

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// 2^x = 2^n 2^r with n the integer nearest to x and |r| <= 1/2. The polynomial for 2^r is the minimax one of degree 5
// (relative error 2^-23.1); with rounding, exp2 is within 2 units in the last place. It is exact at r = 0. Below x = -127 the
// result is 0 (between -127 and -126, smaller than the smallest normal number), so that exp2(-inf) = 0; NaN stays NaN.
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

inline Vec<double> exp2(Vec<double> x) {
  Vec<double> y{};
  for (int i = 0; i < kWidth<double>; ++i) y[i] = std::exp2(x[i]);
  return y;
}

// tanh(x) = e / (e + 2) with e = exp(2 x) - 1 = 2^n (2^r - 1) + (2^n - 1), which has no cancellation near 0. The polynomial
// for 2^r - 1 is the minimax one of degree 6; it must be good relative to 2^r - 1, and so better than the one of exp2.
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

// c[i][j] = alpha[j] c[i][j] + sum over l of a(i, l) b[l][j], for kRows rows and kVectors vectors of columns.
// a(i, l) = a[i * a_row + l * a_depth]: any strides. b and c have rows of whole vectors.
// alpha nullptr: c = a b alone if `fresh`, c += a b otherwise.
template <class A, int kRows, int kVectors>
inline void multiply_tile(
    int64_t depth, const A* a, int64_t a_row, int64_t a_depth, const A* b, int64_t b_row, A* c, int64_t c_row,
    bool fresh, const A* alpha) {
  constexpr int W = kWidth<A>;
  Vec<A> acc[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) {
      acc[i][j] = fresh ? Vec<A>{} : load(c + i * c_row + j * W);
      if (alpha) acc[i][j] *= load(alpha + j * W);
    }
  for (int64_t l = 0; l < depth; ++l) {
    Vec<A> b_l[kVectors];
    for (int j = 0; j < kVectors; ++j) b_l[j] = load(b + l * b_row + j * W);
    for (int i = 0; i < kRows; ++i) {
      const Vec<A> a_il = broadcast(a[i * a_row + l * a_depth]);
      for (int j = 0; j < kVectors; ++j) acc[i][j] += a_il * b_l[j];
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) store(c + i * c_row + j * W, acc[i][j]);
}

// The same for any number of rows, kVectors vectors of columns.
template <class A, int kVectors>
inline void multiply_panel(
    int64_t rows, int64_t depth, const A* a, int64_t a_row, int64_t a_depth, const A* b, int64_t b_row, A* c,
    int64_t c_row, bool fresh, const A* alpha) {
  constexpr int kRows = kVectors == 1 ? 8 : 4;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    multiply_tile<A, kRows, kVectors>(depth, a + i * a_row, a_row, a_depth, b, b_row, c + i * c_row, c_row, fresh, alpha);
  for (; i < rows; ++i)
    multiply_tile<A, 1, kVectors>(depth, a + i * a_row, a_row, a_depth, b, b_row, c + i * c_row, c_row, fresh, alpha);
}

// c [rows][columns] = alpha c + a [rows][depth] b [depth][columns]; columns is a multiple of the vector width.
template <class A>
void multiply(
    int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t a_row, int64_t a_depth, const A* b,
    int64_t b_row, A* c, int64_t c_row, bool fresh, const A* alpha = nullptr) {
  constexpr int W = kWidth<A>;
  constexpr int kVectors = kRegisters == 32 ? 4 : 2;
  int64_t j = 0;
  for (; j + kVectors * W <= columns; j += kVectors * W)
    multiply_panel<A, kVectors>(rows, depth, a, a_row, a_depth, b + j, b_row, c + j, c_row, fresh, alpha ? alpha + j : alpha);
  if (kVectors > 2 && j + 2 * W <= columns) {
    multiply_panel<A, 2>(rows, depth, a, a_row, a_depth, b + j, b_row, c + j, c_row, fresh, alpha ? alpha + j : alpha);
    j += 2 * W;
  }
  for (; j < columns; j += W)
    multiply_panel<A, 1>(rows, depth, a, a_row, a_depth, b + j, b_row, c + j, c_row, fresh, alpha ? alpha + j : alpha);
}

}  // namespace
