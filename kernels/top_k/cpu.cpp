// Top-K and sampling on the CPU. The definitions, bit for bit, are reference.py's.
//
// What it does. A row is read once, front to back, against a threshold: the k-th best value seen so far. Nearly every
// vector of the row lies below it and costs one load and one comparison. What does not lie below goes into a small
// buffer; when that is full, the k best of it are kept, and the threshold rises. On random data about
// k ln(n / k) of n values ever enter the buffer; on the worst data (ascending rows) all do, at a bounded cost each.
//
// An entry of the buffer is one 64-bit integer: the value as an order-preserving 32-bit key above the complement of its
// index. Larger integers are better candidates, no two are equal, and ties go to the lower index by themselves.
// Such integers are sorted by a bitonic network of vector minima and maxima: no branch depends on the data.
//
// Why the GPU does it otherwise. A threshold that rises as the row goes by is a chain of dependent steps, which a core
// with one row in its cache runs quickly. A GPU needs ten thousand independent loads in flight: triton_*.py read all
// parts of a row at once, and each finds its own threshold.
//
// Knows the stable part of torch's C++ interface; knows nothing of models. Arguments were checked in op.py.

// Multiplications and additions are fused where the code says so, as in reference.py: elsewhere it would give other bits.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if !defined(TOY_LM_PLAIN) && (defined(__AVX512F__) || defined(__AVX2__))
#include <immintrin.h>
#endif

namespace {

using torch::stable::Tensor;

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than a register are passed within this file alone

#if !defined(TOY_LM_PLAIN) && defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int kBytes = 64;
#elif !defined(TOY_LM_PLAIN) && defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;  // the compiler's own vectors: SSE2, NEON, or a loop
#endif
constexpr int kLanes = kBytes / 4;   // fp32 numbers in a vector
constexpr int kWide = kBytes / 8;    // 64-bit numbers in a vector

typedef float Float __attribute__((vector_size(kBytes)));
typedef int32_t Int __attribute__((vector_size(kBytes)));
typedef int64_t Long __attribute__((vector_size(kBytes)));
typedef int32_t HalfInt __attribute__((vector_size(kBytes / 2)));  // widens to a Long

constexpr int kBlock = 512;  // a row is read in blocks of so many elements; half-precision blocks are widened first
constexpr int64_t kGrain = 16384;  // elements that are worth waking a thread for
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kWeightBits = 40;
constexpr float kMinTemperature = 0x1p-64f;
constexpr float kRound = 0x1.8p23f;
constexpr float kExp2[5] = {0.0013264727f, 0.009671513f, 0.055507336f, 0.24022242f, 0.693147f};

// ---- vectors ----

template <class V>
V load(const void* address) {
  V v;
  std::memcpy(&v, address, sizeof v);
  return v;
}

Float broadcast(float x) { return Float{} + x; }

// Half of a vector, the lower (0) or the upper (1), with 64 bits per number.
template <int kUpper>
Long widen_half(Int v) {
  HalfInt half;
  std::memcpy(&half, reinterpret_cast<const char*>(&v) + kUpper * sizeof half, sizeof half);
  return __builtin_convertvector(half, Long);
}

Int lane_numbers() {
  Int lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

Long wide_lane_numbers() {
  Long lanes{};
  for (int i = 0; i < kWide; ++i) lanes[i] = i;
  return lanes;
}

float max_of(Float v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// a or b, whichever is larger, in each lane; b where a is NaN.
Float larger(Float a, Float b) {
#if !defined(TOY_LM_PLAIN) && defined(__AVX512F__) && defined(__AVX512DQ__)
  return (Float)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// a * b + c, rounded once.
float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

Float multiply_add(Float a, Float b, Float c) {
#if !defined(TOY_LM_PLAIN) && defined(__AVX512F__) && defined(__AVX512DQ__)
  return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif !defined(TOY_LM_PLAIN) && defined(__AVX2__) && defined(__FMA__)
  return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < kLanes; ++i) a[i] = std::fma(a[i], b[i], c[i]);
  return a;
#endif
}

// Bit i says that v[i] is negative.
uint32_t sign_bits(Int v) {
#if !defined(TOY_LM_PLAIN) && defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)v);
#elif !defined(TOY_LM_PLAIN) && defined(__AVX2__)
  return _mm256_movemask_ps((__m256)v);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(v[i] < 0) << i;
  return bits;
#endif
}

// ---- rows of fp32, fp16 and bf16 ----

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

float widen(float x) { return x; }
float widen(BFloat x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
float widen(Half x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;  // exact, subnormal halves included
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;  // infinity and NaN keep their mantissa
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | uint32_t(x.bits & 0x8000) << 16);
}

float narrow(float x, float) { return x; }
BFloat narrow(float x, BFloat) { return {uint16_t(std::bit_cast<uint32_t>(x) >> 16)}; }  // exact: x was a bf16
Half narrow(float x, Half) {  // exact: x was an fp16
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x7f800000) return {uint16_t(sign | 0x7c00 | (magnitude > 0x7f800000 ? 0x200 : 0))};
  return {uint16_t(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p-112f) >> 13)};
}

// The next `count` elements as fp32: the row itself, or `buffer` filled from it. Behind a partial block, -inf.
template <class T>
const float* read_block(const T* row, int64_t count, float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == kBlock) return row;
    std::memcpy(buffer, row, count * sizeof(float));
  } else {
    for (int64_t i = 0; i < count; ++i) buffer[i] = widen(row[i]);
  }
  std::fill(buffer + count, buffer + (count + kLanes - 1) / kLanes * kLanes, -kInfinity);
  return buffer;
}

// ---- candidates: value and index in one integer ----

constexpr int64_t kNothing = std::numeric_limits<int64_t>::min();

int64_t pack(float x, uint32_t index) {
  int32_t key = std::bit_cast<int32_t>(x + 0.0f);  // -0.0 becomes 0.0
  key ^= (key >> 31) & 0x7fffffff;                 // now integers are ordered as the floats are
  if (x != x) key = 0x7fffffff;                    // NaN above all
  return int64_t(uint64_t(uint32_t(key)) << 32 | (0xffffffffu - index));
}

// `pack` for a whole vector, whose first element has index `first`.
void pack(Float x, int64_t first, int64_t* out) {
  Int key = (Int)(x + 0.0f);
  key ^= (key >> 31) & 0x7fffffff;
  key = x != x ? Int{} + 0x7fffffff : key;
  const Long last = Long{} + (0xffffffff - first);
  const Long lower = widen_half<0>(key) << 32 | (last - wide_lane_numbers());
  const Long upper = widen_half<1>(key) << 32 | (last - kWide - wide_lane_numbers());
  std::memcpy(out, &lower, sizeof lower);
  std::memcpy(out + kWide, &upper, sizeof upper);
}

float value_of(int64_t candidate) {
  int32_t key = int32_t(candidate >> 32);
  if (key == 0x7fffffff) return kNaN;
  return std::bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff));
}

int64_t index_of(int64_t candidate) { return int64_t(0xffffffffu - uint32_t(candidate)); }

// ---- the bitonic network (Batcher 1968), descending ----

// Lane i of the result is lane i ^ kStride of v.
template <int kStride, int... kLane>
Long exchange_lanes(Long v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kStride)...);
}

// All ones in the lanes whose bit kBit is clear: the lanes that take the larger number.
template <int kBit, int... kLane>
Long upper_lanes(std::integer_sequence<int, kLane...>) {
  return Long{((kLane & kBit) ? 0 : -1)...};
}

// Compare elements kStride apart; blocks of kSize elements are made descending and ascending in turn.
// `flipped` turns all directions round.
template <int kVectors, int kSize, int kStride>
inline void compare(Long (&v)[kVectors], bool flipped) {
  if constexpr (kStride >= kWide) {
    constexpr int kApart = kStride / kWide;
    for (int i = 0; i < kVectors; ++i) {
      if (i & kApart) continue;
      const Long a = v[i], b = v[i + kApart];
      const Long larger = a > b ? a : b, smaller = a > b ? b : a;
      const bool ascending = ((i * kWide & kSize) != 0) != flipped;
      v[i] = ascending ? smaller : larger;
      v[i + kApart] = ascending ? larger : smaller;
    }
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, kWide>{};
    for (int i = 0; i < kVectors; ++i) {
      const Long a = v[i], b = exchange_lanes<kStride>(a, lanes);
      const Long larger = a > b ? a : b, smaller = a > b ? b : a;
      Long take_larger = upper_lanes<kStride>(lanes);
      if constexpr (kSize < kWide) take_larger ^= ~upper_lanes<kSize>(lanes);
      else if (i * kWide & kSize) take_larger = ~take_larger;
      if (flipped) take_larger = ~take_larger;
      v[i] = take_larger ? larger : smaller;
    }
  }
}

template <int kVectors, int kSize, int kStride>
inline void merge(Long (&v)[kVectors], bool flipped) {
  compare<kVectors, kSize, kStride>(v, flipped);
  if constexpr (kStride > 1) merge<kVectors, kSize, kStride / 2>(v, flipped);
}

template <int kVectors, int kSize>
inline void sort_network(Long (&v)[kVectors], bool flipped) {
  if constexpr (kSize > 2) sort_network<kVectors, kSize / 2>(v, flipped);
  merge<kVectors, kSize, kSize / 2>(v, flipped);
}

// kCount elements in registers: sorted from any order, or merged from a bitonic one.
template <int kCount, bool kMergeOnly>
void sort_block(int64_t* a, bool ascending) {
  constexpr int kVectors = kCount / kWide;
  Long v[kVectors];
  for (int i = 0; i < kVectors; ++i) v[i] = load<Long>(a + i * kWide);
  if constexpr (kMergeOnly) merge<kVectors, kCount, kCount / 2>(v, ascending);
  else sort_network<kVectors, kCount>(v, ascending);
  std::memcpy(a, v, sizeof v);
}

constexpr int kInRegisters = 64;

// Sort `count` integers, a power of two of at least 16, in descending order.
void sort_descending(int64_t* a, int64_t count) {
  if (count <= 16) return sort_block<16, false>(a, false);
  if (count <= 32) return sort_block<32, false>(a, false);
  for (int64_t i = 0; i < count; i += kInRegisters) sort_block<kInRegisters, false>(a + i, i & kInRegisters);
  for (int64_t size = 2 * kInRegisters; size <= count; size *= 2) {
    for (int64_t stride = size / 2; stride >= kInRegisters; stride /= 2) {
      for (int64_t i = 0; i < count; i += kWide) {
        if (i & stride) {
          i += stride - kWide;
          continue;
        }
        const Long x = load<Long>(a + i), y = load<Long>(a + i + stride);
        const Long larger = x > y ? x : y, smaller = x > y ? y : x;
        const bool ascending = i & size;
        std::memcpy(a + i, ascending ? &smaller : &larger, sizeof x);
        std::memcpy(a + i + stride, ascending ? &larger : &smaller, sizeof x);
      }
    }
    for (int64_t i = 0; i < count; i += kInRegisters) sort_block<kInRegisters, true>(a + i, i & size);
  }
}

int64_t padded(int64_t count) { return int64_t(std::bit_ceil(uint64_t(std::max<int64_t>(count, 16)))); }

// A number that exactly k of `count` different integers reach, by halving the range in which the k-th largest can lie.
int64_t kth_largest(const int64_t* a, int64_t count, int64_t k) {
  int64_t low = a[0], high = a[0];
  for (int64_t i = 1; i < count; ++i) low = std::min(low, a[i]), high = std::max(high, a[i]);
  while (low < high) {
    const int64_t trial = low + int64_t((uint64_t(high) - uint64_t(low)) / 2) + 1;
    int64_t reached = 0;
    for (int64_t i = 0; i < count; ++i) reached += a[i] >= trial;
    if (reached == k) return trial;
    if (reached > k) low = trial;
    else high = trial - 1;
  }
  return low;
}

// The best candidates of a row. One object per thread: its buffer is kept between rows.
class Selection {
 public:
  // The best k of the row, 1 <= k <= n: in descending order, or else by their indices.
  template <class T>
  int64_t* select(const T* row, int64_t n, int64_t k, bool sorted) {
    k_ = k;
    sorted_ = sorted;
    filled_ = 0;
    const bool guessed = k >= kGuessFrom && n >= 8 * std::max(k, kSample);
    reserve(std::max(2 * padded(k), guessed ? kSample : 0));
    if (guessed) {
      scan_row(row, n, 0, guess(row, n));
      if (filled_ >= k) return best();
      filled_ = 0;
    }
    const int64_t head = std::min<int64_t>(n, capacity_);  // until the buffer is full for the first time, all enter
    float block[kBlock];
    for (; filled_ < head; filled_ += kBlock) {
      const int64_t count = std::min<int64_t>(kBlock, head - filled_);
      const float* x = read_block(row + filled_, count, block);
      for (int64_t i = 0; i < count; i += kLanes) pack(load<Float>(x + i), filled_ + i, &buffer_[filled_ + i]);
    }
    filled_ = head;
    scan_row(row, n, head, shrink());
    return best();
  }

  // Room for `count` integers, a power of two, to be used in another way.
  int64_t* reserve(int64_t count) {
    capacity_ = count;
    if (int64_t(buffer_.size()) < count) buffer_.resize(count);
    return buffer_.data();
  }

 private:
  static constexpr int64_t kSample = 512, kGuessFrom = 64, kRun = 16;

  // For large k it pays to begin with a threshold, guessed from a sample: a little below where the k-th best should be.
  template <class T>
  float guess(const T* row, int64_t n) {
    int64_t* sample = buffer_.data();
    for (int64_t i = 0; i < kSample; ++i) {
      const int64_t index = i / kRun * (n / (kSample / kRun)) + i % kRun;
      sample[i] = pack(widen(row[index]), uint32_t(index));
    }
    const double expected = double(k_) * kSample / double(n);
    const int64_t rank = std::min<int64_t>(kSample, int64_t(expected + 4 * std::sqrt(expected)) + 4);
    return value_of(kth_largest(sample, kSample, rank));
  }

  // Take in what exceeds the threshold from `start` on.
  template <class T>
  void scan_row(const T* row, int64_t n, int64_t start, float threshold) {
    float block[kBlock];
    for (; start < n; start += kBlock) {
      const int64_t count = std::min<int64_t>(kBlock, n - start);
      threshold = scan(read_block(row + start, count, block), count, start, threshold);
    }
  }

  int64_t* best() {
    shrink();
    if (sorted_) {
      std::fill(buffer_.begin() + k_, buffer_.begin() + padded(k_), kNothing);
      sort_descending(buffer_.data(), padded(k_));
    }
    return buffer_.data();
  }

  float scan(const float* x, int64_t count, int64_t start, float threshold) {
    for (int64_t i = 0; i < count; i += kLanes) {
      uint32_t above = sign_bits(~(load<Float>(x + i) <= threshold));  // NaN is above, too
      while (above) {
        const int64_t lane = std::countr_zero(above);
        above &= above - 1;
        buffer_[filled_++] = pack(x[i + lane], start + i + lane);
        if (filled_ == capacity_) threshold = shrink();
      }
    }
    return threshold;
  }

  // Keep the best k of the buffer, in its order; returns the value that a later candidate has to exceed.
  float shrink() {
    if (filled_ <= k_) return -kInfinity;
    const int64_t cut = kth_largest(buffer_.data(), filled_, k_);
    int64_t kept = 0, least = std::numeric_limits<int64_t>::max();
    for (int64_t i = 0; i < filled_; ++i) {
      const int64_t candidate = buffer_[i];
      buffer_[kept] = candidate;
      kept += candidate >= cut;
      least = candidate >= cut ? std::min(least, candidate) : least;
    }
    filled_ = kept;
    return value_of(least);
  }

  int64_t k_ = 0, filled_ = 0, capacity_ = 0;
  bool sorted_ = true;
  std::vector<int64_t> buffer_;
};

// ---- top_k ----

template <class T>
void unpack(const int64_t* best, int64_t k, T* values, int64_t* indices) {
  for (int64_t i = 0; i < k; ++i) values[i] = narrow(value_of(best[i]), T{});
  for (int64_t i = 0; i < k; ++i) indices[i] = index_of(best[i]);
}

template <class T>
void top_k_rows(const Tensor& x, int64_t k, Tensor& values, Tensor& indices) {
  const int64_t batch = x.size(0), n = x.size(1), stride = x.stride(0);
  const T* rows = static_cast<const T*>(x.const_data_ptr());
  T* out = static_cast<T*>(values.mutable_data_ptr());
  int64_t* out_indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  torch::stable::parallel_for(0, batch, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
    Selection selection;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t* best = selection.select(rows + row * stride, n, k, true);
      unpack(best, k, out + row * k, out_indices + row * k);
    }
  });
}

// Calls f with a null pointer of the element type of x.
template <class F>
void by_dtype(const Tensor& x, const F& f) {
  using torch::headeronly::ScalarType;
  if (x.scalar_type() == ScalarType::Float) f(static_cast<float*>(nullptr));
  else if (x.scalar_type() == ScalarType::Half) f(static_cast<Half*>(nullptr));
  else f(static_cast<BFloat*>(nullptr));
}

std::tuple<Tensor, Tensor> top_k(Tensor x, int64_t k) {
  using torch::headeronly::ScalarType;
  Tensor values = torch::stable::new_empty(x, {x.size(0), k});
  Tensor indices = torch::stable::new_empty(x, {x.size(0), k}, ScalarType::Long);
  by_dtype(x, [&](auto* type) { top_k_rows<std::remove_pointer_t<decltype(type)>>(x, k, values, indices); });
  return {values, indices};
}

// ---- sampling ----

struct Parameters {
  float temperature;
  int64_t top_k;  // 0: off
  float top_p, min_p;
  uint64_t seed, step;

  bool allowed(int64_t vocab_size) const {
    return temperature >= 0 && temperature < kInfinity && top_k >= 0 && top_k <= vocab_size && top_p > 0 &&
           top_p <= 1 && min_p >= 0 && min_p <= 1;
  }
};

struct Answer {
  int64_t token_id = -1;
  float raw_logprob = kNaN, processed_logprob = kNaN;
};

// The first 64 bits of Philox4x32-10 (Salmon et al., SC'11) with key `seed` and counter `step`.
uint64_t philox(uint64_t seed, uint64_t step) {
  uint32_t c0 = uint32_t(step), c1 = uint32_t(step >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * c0, product1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return uint64_t(c0) << 32 | c1;
}

// floor(total * u / 2^64); total below 2^61.
int64_t random_below(int64_t total, uint64_t u) {
  const uint64_t high = uint64_t(total) >> 32, low = uint64_t(total) & 0xffffffffu;
  const uint64_t u_high = u >> 32, u_low = u & 0xffffffffu;
  const uint64_t middle = u_high * low, cross = u_low * high;
  const uint64_t carry = (u_low * low >> 32) + (middle & 0xffffffffu) + (cross & 0xffffffffu);
  return int64_t(u_high * high + (middle >> 32) + (cross >> 32) + (carry >> 32));
}

// total * p, with p lowered by what rounding to fp32 may have added.
int64_t share(int64_t total, float p) {
  int64_t p_bits = int64_t(p * 0x1p31f);
  if (p < 1.0f) p_bits -= 1 + (p_bits >> 24);
  return (total >> 31) * p_bits + ((total & 0x7fffffff) * p_bits >> 31);
}

// 2^(y - whole), in [0.7, 1.42], where `rounded` is kRound + whole, and whole the whole number next to y in [-126, 0].
template <class F>
F exp2_fraction(F y, F& rounded) {
  rounded = y + kRound;
  const F fraction = y - (rounded - kRound);
  F power = F{} + kExp2[0];
  for (int i = 1; i < 5; ++i) power = multiply_add(power, fraction, F{} + kExp2[i]);
  return multiply_add(power, fraction, F{} + 1.0f);
}

// x * 2^whole: the lowest bits of `rounded` are those of `whole`, and are added to the exponent.
Float times_power_of_2(Float x, Float rounded) { return (Float)((Int)x + ((Int)rounded << 23)); }

int64_t weight(float z, float rate) {
  float y = z * rate, rounded;
  y = y < -63.0f ? -63.0f : y;
  const float power = exp2_fraction(y, rounded);
  return (int64_t(power * 0x1p24f) << (kWeightBits - 24)) >> int(kRound - rounded);
}

// `weight` for a vector, in two halves.
struct Weights {
  Long lower, upper;
};

Weights weights(Float z, float rate) {
  Float rounded;
  const Float power = exp2_fraction(larger(z * rate, broadcast(-63.0f)), rounded);
#if !defined(TOY_LM_PLAIN) && defined(__AVX512F__) && defined(__AVX512DQ__)
  const __m512 all = (__m512)times_power_of_2(power * 0x1p40f, rounded);
  return {(Long)_mm512_cvttps_epi64(_mm512_castps512_ps256(all)),
          (Long)_mm512_cvttps_epi64(_mm512_extractf32x8_ps(all, 1))};
#else
  const Int mantissa = __builtin_convertvector(power * 0x1p24f, Int);
  const Int shift = __builtin_convertvector(kRound - rounded, Int);
  return {(widen_half<0>(mantissa) << (kWeightBits - 24)) >> widen_half<0>(shift),
          (widen_half<1>(mantissa) << (kWeightBits - 24)) >> widen_half<1>(shift)};
#endif
}

float rate_of(float temperature) { return kLog2E / std::max(temperature, kMinTemperature); }

// A row of logits, widened block by block.
template <class T>
class Row {
 public:
  Row(const T* logits, int64_t vocab_size) : logits_(logits), vocab_size_(vocab_size) {}

  int64_t vocab_size() const { return vocab_size_; }
  float operator[](int64_t token) const { return widen(logits_[token]); }
  const T* logits() const { return logits_; }

  // f(first token of the block, its fp32 logits, how many) for every block of the row, in order.
  template <class F>
  void for_blocks(const F& f) const {
    for (int64_t start = 0; start < vocab_size_; start += kBlock) read(start, f);
  }

  // The same for the one block that starts here.
  template <class F>
  void read(int64_t start, const F& f) const {
    float buffer[kBlock];
    const int64_t count = std::min<int64_t>(kBlock, vocab_size_ - start);
    f(start, read_block(logits_ + start, count, buffer), count);
  }

 private:
  const T* logits_;
  int64_t vocab_size_;
};

// The largest logit; NaN if any is NaN.
template <class T>
float row_max(const Row<T>& row) {
  Float largest = broadcast(-kInfinity);
  Int nan{};
  row.for_blocks([&](int64_t, const float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const Float v = load<Float>(x + i);
      largest = v > largest ? v : largest;
      nan |= v != v;
    }
  });
  for (int i = 0; i < kLanes; ++i)
    if (nan[i]) return kNaN;
  return max_of(largest);
}

// log(sum(exp(x - max))).
template <class T>
float log_sum_exp(const Row<T>& row, float max) {
  double totals[kLanes] = {};
  row.for_blocks([&](int64_t, const float* x, int64_t count) {
    Float sum{};
    for (int64_t i = 0; i < count; i += kLanes) {
      const Float y = larger((load<Float>(x + i) - max) * kLog2E, broadcast(-126.0f));  // 2^-126 adds nothing to 1
      Float rounded;
      const Float power = exp2_fraction(y, rounded);
      sum += times_power_of_2(power, rounded);
    }
    for (int i = 0; i < kLanes; ++i) totals[i] += sum[i];
  });
  return float(std::log(std::accumulate(totals, totals + kLanes, 0.0)));
}

// Which tokens of a row may be drawn: those no worse than a candidate, and at least so heavy.
struct Filter {
  float value = -kInfinity;  // of the worst candidate that is kept, and its index
  int32_t index = std::numeric_limits<int32_t>::max();
  int64_t least_weight = 0;
};

struct Scale {
  float max, rate;  // weight(x - max, rate)
};

// The weights of a block of logits, 0 where the filter keeps a token out; returns their sum.
int64_t kept_weights(const float* x, int64_t start, int64_t count, Scale scale, const Filter& filter, int64_t* out) {
  Long sum{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Float v = load<Float>(x + i);
    const Int tokens = lane_numbers() + int32_t(start + i);
    const Int kept = (v > filter.value) | ((v == filter.value) & (tokens <= filter.index));
    Weights w = weights(v - scale.max, scale.rate);
    w.lower &= widen_half<0>(kept) & (w.lower >= filter.least_weight);
    w.upper &= widen_half<1>(kept) & (w.upper >= filter.least_weight);
    sum += w.lower + w.upper;
    std::memcpy(out + i, &w, sizeof w);
  }
  int64_t total = 0;
  for (int i = 0; i < kWide; ++i) total += sum[i];
  return total;
}

// One token out of all that the filter keeps, by their weights in token order; `total` becomes the sum of the weights.
template <class T>
int64_t draw(const Row<T>& row, Scale scale, const Filter& filter, uint64_t u, std::vector<int64_t>& block_sums,
             int64_t& total) {
  int64_t weight[kBlock];
  block_sums.clear();
  total = 0;
  row.for_blocks([&](int64_t start, const float* x, int64_t count) {
    block_sums.push_back(kept_weights(x, start, count, scale, filter, weight));
    total += block_sums.back();
  });
  int64_t left = random_below(total, u), block = 0, token = 0;
  while (left >= block_sums[block]) left -= block_sums[block++];
  row.read(block * kBlock, [&](int64_t start, const float* x, int64_t count) {
    kept_weights(x, start, count, scale, filter, weight);
    while (left >= weight[token]) left -= weight[token++];
  });
  return block * kBlock + token;
}

// The cut of top-p over a whole row, without sorting it: the mass in each of 4096 bins of the exponent, then a sort of
// the one bin in which the running mass, from the likeliest down, reaches p.
constexpr int kBins = 4096;
constexpr int64_t kSortedWhole = 1024;  // so short a row is rather sorted than put into bins

Int bins_of(Float x, Scale scale) {
  const Float y = (x - scale.max) * scale.rate;
  return __builtin_convertvector((y < -63.0f ? broadcast(-63.0f) : y) * -64.0f, Int);
}

template <class T>
void cut_at_top_p(const Row<T>& row, Scale scale, float top_p, Selection& selection, Filter& filter) {
  int64_t mass[kBins] = {}, block_weights[kBlock], total = 0;
  int32_t bins[kBlock];
  row.for_blocks([&](int64_t start, const float* x, int64_t count) {
    kept_weights(x, start, count, scale, Filter{}, block_weights);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Int bin = bins_of(load<Float>(x + i), scale);
      std::memcpy(bins + i, &bin, sizeof bin);
    }
    for (int64_t i = 0; i < count; ++i) mass[bins[i]] += block_weights[i];
  });
  for (int64_t m : mass) total += m;
  int64_t wanted = std::max<int64_t>(share(total, top_p), 1);
  int bin = 0;
  while (wanted > mass[bin]) wanted -= mass[bin++];

  int64_t* candidates = selection.reserve(padded(row.vocab_size()));
  int64_t found = 0;
  row.for_blocks([&](int64_t start, const float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const Int inside = bins_of(load<Float>(x + i), scale) == bin;
      for (uint32_t bits = sign_bits(inside); bits; bits &= bits - 1) {
        const int64_t token = i + std::countr_zero(bits);
        if (token < count) candidates[found++] = pack(x[token], start + token);
      }
    }
  });
  if (!std::is_sorted(candidates, candidates + found, std::greater<>())) {
    std::fill(candidates + found, candidates + padded(found), kNothing);
    sort_descending(candidates, padded(found));
  }
  for (int64_t i = 0; wanted > 0; ++i) {
    filter.value = value_of(candidates[i]);
    filter.index = int32_t(index_of(candidates[i]));
    wanted -= weight(filter.value - scale.max, scale.rate);
  }
}

// The part of a row that top-k left, in descending order or, if there is no top-p, in token order: top-p, min-p and the
// draw.
int64_t draw_from_best(int64_t* best, int64_t k, const Parameters& p, Scale scale, int64_t least_weight,
                       int64_t& total) {
  int64_t mass = 0;
  for (int64_t i = 0; i < k; ++i) mass += weight(value_of(best[i]) - scale.max, scale.rate);
  const int64_t wanted = std::max<int64_t>(share(mass, p.top_p), 1);
  // Kept candidates are written over the front of the list as (complement of the token, weight), then put in token order.
  int64_t kept = 0, before = 0;
  total = 0;
  for (int64_t i = 0; i < k && before < wanted; ++i) {
    const int64_t w = weight(value_of(best[i]) - scale.max, scale.rate);
    before += w;
    if (w < least_weight) continue;
    total += w;
    best[kept++] = (int64_t(0xfffff) - index_of(best[i])) << (kWeightBits + 1) | w;
  }
  if (p.top_p < 1.0f) {
    std::fill(best + kept, best + padded(kept), kNothing);
    sort_descending(best, padded(kept));
  }
  int64_t left = random_below(total, philox(p.seed, p.step));
  constexpr int64_t kWeightMask = (int64_t(1) << (kWeightBits + 1)) - 1;
  while (left >= (*best & kWeightMask)) left -= *best++ & kWeightMask;
  return int64_t(0xfffff) - (*best >> (kWeightBits + 1));
}

// What a thread keeps between rows.
struct Workspace {
  Selection selection;
  std::vector<int64_t> block_sums;
};

template <class T>
Answer sample_row(const Row<T>& row, const Parameters& p, bool return_logprobs, Workspace& workspace) {
  Answer answer;
  const int64_t vocab_size = row.vocab_size();
  if (!p.allowed(vocab_size)) return answer;
  const bool greedy = p.temperature == 0;
  const int64_t k = greedy ? 1 : p.top_k == 0 ? vocab_size : p.top_k;
  const float temperature = greedy ? 1.0f : p.temperature;
  const int64_t least_weight = int64_t(p.min_p * 0x1p40f);
  Scale scale{0.0f, rate_of(temperature)};
  int64_t total = 0;
  if (k < vocab_size || (p.top_p < 1.0f && vocab_size <= kSortedWhole)) {
    int64_t* best = workspace.selection.select(row.logits(), vocab_size, k, p.top_p < 1.0f);
    scale.max = value_of(*std::max_element(best, best + k));
    if (!std::isfinite(scale.max)) return answer;
    answer.token_id = draw_from_best(best, k, p, scale, least_weight, total);
  } else {
    scale.max = row_max(row);
    if (!std::isfinite(scale.max)) return answer;
    Filter filter;
    filter.least_weight = least_weight;
    if (p.top_p < 1.0f) cut_at_top_p(row, scale, p.top_p, workspace.selection, filter);
    answer.token_id = draw(row, scale, filter, philox(p.seed, p.step), workspace.block_sums, total);
  }
  if (return_logprobs) {
    const float x = row[answer.token_id];
    answer.raw_logprob = (x - scale.max) - log_sum_exp(row, scale.max);
    const float scaled = (x - scale.max) / std::max(temperature, kMinTemperature);
    answer.processed_logprob = greedy ? 0.0f : scaled - float(std::log(double(total) * 0x1p-40));
  }
  return answer;
}

using OptionalTensor = std::optional<Tensor>;

// A parameter as the op takes it: one number, or a tensor with a value per row, possibly with stride 0.
template <class T>
class PerRow {
 public:
  PerRow(T number, const OptionalTensor& tensor) : number_(number) {
    if (!tensor) return;
    values_ = static_cast<const T*>(tensor->const_data_ptr());
    stride_ = tensor->stride(0);
  }
  bool is_tensor() const { return values_ != nullptr; }
  T operator[](int64_t row) const { return values_ ? values_[row * stride_] : number_; }

 private:
  T number_;
  const T* values_ = nullptr;
  int64_t stride_ = 0;
};

std::tuple<Tensor, Tensor> sample(Tensor logits, double temperature, int64_t top_k, double top_p, double min_p,
                                  int64_t seed, int64_t step, OptionalTensor temperatures, OptionalTensor top_ks,
                                  OptionalTensor top_ps, OptionalTensor min_ps, OptionalTensor seeds,
                                  OptionalTensor steps, bool return_logprobs) {
  using torch::headeronly::ScalarType;
  const int64_t batch = logits.size(0), vocab_size = logits.size(1), stride = logits.stride(0);
  Tensor token_ids = torch::stable::new_empty(logits, {batch}, ScalarType::Long);
  Tensor logprobs = torch::stable::new_empty(logits, {2, return_logprobs ? batch : 0}, ScalarType::Float);
  const PerRow<float> row_temperature(float(temperature), temperatures), row_top_p(float(top_p), top_ps);
  const PerRow<float> row_min_p(float(min_p), min_ps);
  const PerRow<int64_t> row_top_k(top_k, top_ks), row_seed(seed, seeds), row_step(step, steps);
  int64_t* out = static_cast<int64_t*>(token_ids.mutable_data_ptr());
  float* out_logprobs = static_cast<float*>(logprobs.mutable_data_ptr());

  by_dtype(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* rows = static_cast<const T*>(logits.const_data_ptr());
    torch::stable::parallel_for(0, batch, std::max<int64_t>(1, kGrain / vocab_size), [&](int64_t begin, int64_t end) {
      Workspace workspace;
      for (int64_t row = begin; row < end; ++row) {
        const int64_t k = row_top_k[row];
        const Parameters parameters{
            row_temperature[row], row_top_k.is_tensor() && k == 0 ? -1 : k,  // in a tensor, 0 is not allowed
            row_top_p[row], row_min_p[row], uint64_t(row_seed[row]), uint64_t(row_step[row])};
        const Answer answer = sample_row(Row<T>(rows + row * stride, vocab_size), parameters, return_logprobs, workspace);
        out[row] = answer.token_id;
        if (!return_logprobs) continue;
        out_logprobs[row] = answer.raw_logprob;
        out_logprobs[batch + row] = answer.processed_logprob;
      }
    });
  });
  return {token_ids, logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kernels, CPU, m) {
  m.impl("top_k", TORCH_BOX(&top_k));
  m.impl("sample", TORCH_BOX(&sample));
}
