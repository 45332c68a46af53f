// The attention ladder on the CPU, from the formula to threads and vectors, one idea at a time. The step after these is
// the kernel that ships, flash_attention/cpu.cpp.
//
//   S = softmax_scale Q K^T    P = softmax(S)    O = P V        causal: query i sees the keys j <= i
//
//   1 classic      three loops over everything          S, P [seqlen, seqlen] of every head in memory
//   2 tiled        a block of queries at a time         S, P [kBlock, seqlen] of one block in the L2 cache
//   3 online       running maximum and sum              s [kBlock] of one query in registers and the L1 cache
//   4 vectors      kWidth queries side by side          s [kBlock] vectors, acc [head_dim] vectors
//   5 threads      whoever is free takes the next block
//
// Steps 1 to 3 are compiled without vector instructions (with GCC; clang may find some): what those gain is step 4's.
// All take q, k, v and out (pairs, seqlen, head_dim), fp32, contiguous; a pair is one head of one sequence.
//
// Knows nothing of torch: attention_cpu.py calls these through their addresses.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "flash_attention/microkernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#define PLAIN __attribute__((optimize("no-tree-vectorize", "no-tree-slp-vectorize")))
#else
#define PLAIN
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kBlock = 64;  // queries, and keys, that are taken together
constexpr int64_t kMaxHeadDim = 128;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t keys_seen(int64_t query, int64_t seqlen, bool causal) { return causal ? query + 1 : seqlen; }

PLAIN float dot(const float* x, const float* y, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

PLAIN void add_scaled(float* y, float a, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

// A row of scores becomes a row of weights: exp(s - max) / sum.
PLAIN void softmax(float* s, int64_t n) {
  const float row_max = *std::max_element(s, s + n);
  float row_sum = 0;
  for (int64_t j = 0; j < n; ++j) row_sum += s[j] = std::exp(s[j] - row_max);
  for (int64_t j = 0; j < n; ++j) s[j] /= row_sum;
}

}  // namespace

// 1. The formula, a loop for each of its three parts.
EXPORT PLAIN void attention_classic(const float* q, const float* k, const float* v, float* out, int64_t pairs,
                                    int64_t seqlen, int64_t head_dim, bool causal, int64_t /*threads*/) {
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
  const std::unique_ptr<float[]> s(new float[pairs * seqlen * seqlen]);
  for (int64_t row = 0; row < pairs * seqlen; ++row) {
    const float* keys = k + row / seqlen * seqlen * head_dim;
    for (int64_t j = 0; j < keys_seen(row % seqlen, seqlen, causal); ++j)
      s[row * seqlen + j] = scale * dot(q + row * head_dim, keys + j * head_dim, head_dim);
  }
  for (int64_t row = 0; row < pairs * seqlen; ++row)
    softmax(s.get() + row * seqlen, keys_seen(row % seqlen, seqlen, causal));
  for (int64_t row = 0; row < pairs * seqlen; ++row) {
    const float* values = v + row / seqlen * seqlen * head_dim;
    std::fill_n(out + row * head_dim, head_dim, 0.0f);
    for (int64_t j = 0; j < keys_seen(row % seqlen, seqlen, causal); ++j)
      add_scaled(out + row * head_dim, s[row * seqlen + j], values + j * head_dim, head_dim);
  }
}

// 2. The same for kBlock queries at a time, so that their scores stay in the cache; and kBlock keys at a time, so that
// those do, while all of the queries use them.
EXPORT PLAIN void attention_tiled(const float* q, const float* k, const float* v, float* out, int64_t pairs,
                                  int64_t seqlen, int64_t head_dim, bool causal, int64_t /*threads*/) {
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
  const std::unique_ptr<float[]> s(new float[kBlock * seqlen]);
  for (int64_t pair = 0; pair < pairs; ++pair, q += seqlen * head_dim, k += seqlen * head_dim, v += seqlen * head_dim,
               out += seqlen * head_dim)
    for (int64_t m_start = 0; m_start < seqlen; m_start += kBlock) {
      const int64_t m_end = std::min(m_start + kBlock, seqlen), all = keys_seen(m_end - 1, seqlen, causal);
      for (int64_t n_start = 0; n_start < all; n_start += kBlock)
        for (int64_t m = m_start; m < m_end; ++m) {
          const int64_t n_end = std::min(n_start + kBlock, keys_seen(m, seqlen, causal));
          for (int64_t j = n_start; j < std::min(n_end, seqlen); ++j)
            s[(m - m_start) * seqlen + j] = scale * dot(q + m * head_dim, k + j * head_dim, head_dim);
        }
      for (int64_t m = m_start; m < m_end; ++m)
        softmax(s.get() + (m - m_start) * seqlen, keys_seen(m, seqlen, causal));
      std::fill_n(out + m_start * head_dim, (m_end - m_start) * head_dim, 0.0f);
      for (int64_t n_start = 0; n_start < all; n_start += kBlock)
        for (int64_t m = m_start; m < m_end; ++m) {
          const int64_t n_end = std::min(n_start + kBlock, keys_seen(m, seqlen, causal));
          for (int64_t j = n_start; j < n_end; ++j)
            add_scaled(out + m * head_dim, s[(m - m_start) * seqlen + j], v + j * head_dim, head_dim);
        }
    }
}

// 3. The online softmax: a tile of scores is used at once and forgotten.
EXPORT PLAIN void attention_online(const float* q, const float* k, const float* v, float* out, int64_t pairs,
                                   int64_t seqlen, int64_t head_dim, bool causal, int64_t /*threads*/) {
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
  float s[kBlock], row_max[kBlock], row_sum[kBlock];
  for (int64_t pair = 0; pair < pairs; ++pair, q += seqlen * head_dim, k += seqlen * head_dim, v += seqlen * head_dim,
               out += seqlen * head_dim)
    for (int64_t m_start = 0; m_start < seqlen; m_start += kBlock) {
      const int64_t m_end = std::min(m_start + kBlock, seqlen), all = keys_seen(m_end - 1, seqlen, causal);
      std::fill_n(row_max, kBlock, -kInfinity);
      std::fill_n(row_sum, kBlock, 0.0f);
      std::fill_n(out + m_start * head_dim, (m_end - m_start) * head_dim, 0.0f);
      for (int64_t n_start = 0; n_start < all; n_start += kBlock)
        for (int64_t m = m_start; m < m_end; ++m) {
          const int64_t n_end = std::min(n_start + kBlock, keys_seen(m, seqlen, causal));
          float *acc = out + m * head_dim, &old_max = row_max[m - m_start], &sum = row_sum[m - m_start];
          float new_max = old_max;
          for (int64_t j = n_start; j < n_end; ++j) {
            s[j - n_start] = scale * dot(q + m * head_dim, k + j * head_dim, head_dim);
            new_max = std::max(new_max, s[j - n_start]);
          }
          const float alpha = std::exp(old_max - new_max);  // of what came before
          old_max = new_max;
          sum *= alpha;
          for (int64_t d = 0; d < head_dim; ++d) acc[d] *= alpha;
          for (int64_t j = n_start; j < n_end; ++j) {
            const float p = std::exp(s[j - n_start] - new_max);
            sum += p;
            add_scaled(acc, p, v + j * head_dim, head_dim);
          }
        }
      for (int64_t m = m_start; m < m_end; ++m)
        for (int64_t d = 0; d < head_dim; ++d) out[m * head_dim + d] /= row_sum[m - m_start];
    }
}

namespace {

// Attention of the kWidth queries from m_start on, one in each lane of a vector: maximum, sum and rescale become plain
// vector arithmetic, and each number of K and V is read once for all of them.
//
//                lanes: queries
//                [  q^T: head_dim vectors  ]
//    a key   ->  s += k[d] * q^T[d]               one multiply-add for kWidth products
//    a value ->  acc[d] += p * v[d]
void attend_lanes(const float* q, const float* k, const float* v, float* out, int64_t seqlen, int64_t head_dim,
                  bool causal, int64_t m_start) {
  constexpr int64_t W = kWidth<float>;
  using V = Vec<float>;
  const int64_t rows = std::min(W, seqlen - m_start), all = keys_seen(m_start + rows - 1, seqlen, causal);
  const float scale_log2 = static_cast<float>(kLog2E) / std::sqrt(static_cast<float>(head_dim));
  V q_t[kMaxHeadDim], acc[kMaxHeadDim], s[kBlock];
  Bits<float> lane{};
  for (int64_t i = 0; i < W; ++i) lane[i] = static_cast<int32_t>(i);
  for (int64_t d = 0; d < head_dim; ++d) {
    q_t[d] = acc[d] = V{};
    for (int64_t i = 0; i < rows; ++i) q_t[d][i] = scale_log2 * q[(m_start + i) * head_dim + d];
  }
  V row_max = broadcast(-kInfinity), row_sum{};
  for (int64_t n_start = 0; n_start < all; n_start += kBlock) {
    const int64_t n_end = std::min(n_start + kBlock, all);
    V new_max = row_max;
    for (int64_t j = n_start; j < n_end; ++j) {
      V x{};
      for (int64_t d = 0; d < head_dim; ++d) x += k[j * head_dim + d] * q_t[d];
      if (causal && j > m_start) x = select<float>(lane < static_cast<int32_t>(j - m_start), broadcast(-kInfinity), x);
      s[j - n_start] = x;
      new_max = max<float>(new_max, x);
    }
    const V alpha = exp2(row_max - new_max);
    row_max = new_max;
    row_sum *= alpha;
    for (int64_t d = 0; d < head_dim; ++d) acc[d] *= alpha;
    for (int64_t j = n_start; j < n_end; ++j) {
      const V p = exp2(s[j - n_start] - new_max);
      row_sum += p;
      for (int64_t d = 0; d < head_dim; ++d) acc[d] += p * v[j * head_dim + d];
    }
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    acc[d] /= row_sum;
    for (int64_t i = 0; i < rows; ++i) out[(m_start + i) * head_dim + d] = acc[d][i];
  }
}

}  // namespace

// 4. Vectors: kWidth queries at once.
EXPORT void attention_vectors(const float* q, const float* k, const float* v, float* out, int64_t pairs, int64_t seqlen,
                              int64_t head_dim, bool causal, int64_t /*threads*/) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t head = pair * seqlen * head_dim;
    for (int64_t m_start = 0; m_start < seqlen; m_start += kWidth<float>)
      attend_lanes(q + head, k + head, v + head, out + head, seqlen, head_dim, causal, m_start);
  }
}

// 5. Threads: the blocks of queries depend on nothing but K and V, so whoever is free takes the next one, and the last
// queries, which see the most keys, go first.
EXPORT void attention_threads(const float* q, const float* k, const float* v, float* out, int64_t pairs, int64_t seqlen,
                              int64_t head_dim, bool causal, int64_t threads) {
  const int64_t blocks = (seqlen + kWidth<float> - 1) / kWidth<float>;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task; (task = next.fetch_add(1)) < pairs * blocks;) {
      const int64_t head = task / blocks * seqlen * head_dim, m_start = (blocks - 1 - task % blocks) * kWidth<float>;
      attend_lanes(q + head, k + head, v + head, out + head, seqlen, head_dim, causal, m_start);
    }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& thread : others) thread.join();
}
