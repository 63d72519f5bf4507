// Products of a tall matrix with an adapter's few rows or columns, float32, on one core.
//
// A BLAS is made for products whose sides are all long. With r of a dozen, what counts is that every row of the
// tall matrix is read once, while it is in the cache, and that r accumulators stay in registers. The caller passes
// blocks of rows that fit the second-level cache; a tile of rows and columns is then summed in registers.
//
// Every function adds in an order that depends on its arguments' shapes alone.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

// Tiles are arrays of vectors, which the compiler keeps in registers once every index is a constant.
#define UNROLL _Pragma("GCC unroll 32")

// What several products share is loaded once: compilers would rather read it from memory for each.
#if defined(__AVX512F__)
#define KEEP(v) asm("" : "+v"(v))
#elif defined(__x86_64__)
#define KEEP(v) asm("" : "+x"(v))
#else
#define KEEP(v)
#endif

namespace rankalloc::skinny {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float Unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vec v) { *reinterpret_cast<Unaligned*>(to) = v; }
inline Vec spread(float a) { return a - Vec{}; }

// Sums that fit the registers beside what is multiplied.
constexpr int kSums = kLanes == 16 ? 24 : 12;
// Ranks of a tile: two vectors or two rows of each.
constexpr int64_t kRanks = kSums / 2;
// Columns of a tile's factor that stay in the first-level cache.
constexpr int64_t kColumns = 512;

// Vectors that are folded into one at a time.
template <int HALF>
inline Vec fold(Vec a, Vec b) {
  typedef int32_t Index __attribute__((vector_size(kLanes * 4)));
  Index low, high;
  UNROLL for (int lane = 0; lane < kLanes; ++lane) {
    // lanes without the bit come from a, lanes with it from b
    low[lane] = lane & HALF ? lane - HALF + kLanes : lane;
    high[lane] = lane & HALF ? lane + kLanes : lane + HALF;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// Lane j of the result is the sum over the lanes of sums[j], of which there are kLanes.
template <int HALF = kLanes / 2>
inline Vec sum_lanes(Vec* sums) {
  if constexpr (HALF == 0) {
    return sums[0];
  } else {
    UNROLL for (int i = 0; i < HALF; ++i) sums[i] = fold<HALF>(sums[i], sums[i + HALF]);
    return sum_lanes<HALF / 2>(sums);
  }
}

template <int ROWS, int RANKS>
inline void project_tile(
    const float* __restrict x, int64_t ldx, int64_t d, const float* __restrict f, int64_t ldf, float* __restrict z,
    int64_t ldz, bool adds) {
  constexpr int kPiles = (RANKS + kLanes - 1) / kLanes;
  Vec sum[ROWS][RANKS];
  UNROLL for (int i = 0; i < ROWS; ++i) {
    UNROLL for (int k = 0; k < RANKS; ++k) sum[i][k] = Vec{};
  }
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    Vec left[ROWS];
    UNROLL for (int i = 0; i < ROWS; ++i) left[i] = load(x + i * ldx + c);
    UNROLL for (int k = 0; k < RANKS; ++k) {
      Vec right = load(f + k * ldf + c);
      KEEP(right);
      UNROLL for (int i = 0; i < ROWS; ++i) sum[i][k] += left[i] * right;
    }
  }
  UNROLL for (int i = 0; i < ROWS; ++i) {
    float whole[kPiles * kLanes];
    Vec pile[kPiles * kLanes];
    UNROLL for (int k = 0; k < kPiles * kLanes; ++k) pile[k] = k < RANKS ? sum[i][k < RANKS ? k : 0] : Vec{};
    UNROLL for (int k = 0; k < kPiles; ++k) store(whole + k * kLanes, sum_lanes(pile + k * kLanes));
    for (int64_t rest = c; rest < d; ++rest) {
      for (int k = 0; k < RANKS; ++k) whole[k] += x[i * ldx + rest] * f[k * ldf + rest];
    }
    float* to = z + i * ldz;
    if (adds) {
      for (int k = 0; k < RANKS; ++k) whole[k] += to[k];
    }
    std::copy_n(whole, RANKS, to);
  }
}

template <int RANKS>
inline void project_ranks(
    const float* x, int64_t ldx, int64_t rows, int64_t d, const float* f, int64_t ldf, float* z, int64_t ldz) {
  constexpr int kRows = kSums / RANKS < 4 ? kSums / RANKS : 4;
  for (int64_t c = 0; c < d; c += kColumns) {
    const int64_t columns = std::min(kColumns, d - c);
    int64_t n = 0;
    for (; n + kRows <= rows; n += kRows) {
      project_tile<kRows, RANKS>(x + n * ldx + c, ldx, columns, f + c, ldf, z + n * ldz, ldz, c > 0);
    }
    for (; n < rows; ++n) project_tile<1, RANKS>(x + n * ldx + c, ldx, columns, f + c, ldf, z + n * ldz, ldz, c > 0);
  }
}

template <int ROWS, int VECS>
inline void expand_tile(
    const float* __restrict z, int64_t ldz, int64_t r, const float* __restrict f, int64_t ldf, const float* start,
    int64_t lds, float* __restrict y, int64_t ldy) {
  Vec sum[ROWS][VECS];
  UNROLL for (int i = 0; i < ROWS; ++i) {
    UNROLL for (int v = 0; v < VECS; ++v) sum[i][v] = start ? load(start + i * lds + v * kLanes) : Vec{};
  }
  for (int64_t k = 0; k < r; ++k) {
    Vec right[VECS];
    UNROLL for (int v = 0; v < VECS; ++v) right[v] = load(f + k * ldf + v * kLanes);
    UNROLL for (int i = 0; i < ROWS; ++i) {
      const Vec left = spread(z[i * ldz + k]);
      UNROLL for (int v = 0; v < VECS; ++v) sum[i][v] += left * right[v];
    }
  }
  UNROLL for (int i = 0; i < ROWS; ++i) {
    UNROLL for (int v = 0; v < VECS; ++v) store(y + i * ldy + v * kLanes, sum[i][v]);
  }
}

template <int ROWS>
inline void expand_rows(
    const float* z, int64_t ldz, int64_t r, const float* f, int64_t ldf, const float* start, int64_t lds, float* y,
    int64_t ldy, int64_t d) {
  constexpr int kVecs = 4;
  const auto at = [start](int64_t c) { return start ? start + c : nullptr; };
  int64_t c = 0;
  for (; c + kVecs * kLanes <= d; c += kVecs * kLanes) {
    expand_tile<ROWS, kVecs>(z, ldz, r, f + c, ldf, at(c), lds, y + c, ldy);
  }
  for (; c + kLanes <= d; c += kLanes) expand_tile<ROWS, 1>(z, ldz, r, f + c, ldf, at(c), lds, y + c, ldy);
  for (; c < d; ++c) {
    UNROLL for (int i = 0; i < ROWS; ++i) {
      float sum = start ? start[i * lds + c] : 0.0f;
      for (int64_t k = 0; k < r; ++k) sum += z[i * ldz + k] * f[k * ldf + c];
      y[i * ldy + c] = sum;
    }
  }
}

// y (rows, d) = z (rows, r) · f (r, d) + start (rows, d), where there is one; it is the same row for all with lds 0.
inline void expand(
    const float* z, int64_t ldz, int64_t rows, int64_t r, const float* f, int64_t ldf, const float* start, int64_t lds,
    float* y, int64_t ldy, int64_t d) {
  constexpr int kRows = kSums / 4;
  int64_t n = 0;
  const auto at = [start, lds](int64_t n) { return start ? start + n * lds : nullptr; };
  for (; n + kRows <= rows; n += kRows) {
    expand_rows<kRows>(z + n * ldz, ldz, r, f, ldf, at(n), lds, y + n * ldy, ldy, d);
  }
  for (; n < rows; ++n) expand_rows<1>(z + n * ldz, ldz, r, f, ldf, at(n), lds, y + n * ldy, ldy, d);
}

template <int RANKS, int VECS>
inline void outer_tile(
    const float* __restrict z, int64_t ldz, const float* __restrict x, int64_t ldx, int64_t rows, float* __restrict g,
    int64_t ldg) {
  Vec sum[RANKS][VECS];
  UNROLL for (int i = 0; i < RANKS; ++i) {
    UNROLL for (int v = 0; v < VECS; ++v) sum[i][v] = load(g + i * ldg + v * kLanes);
  }
  for (int64_t n = 0; n < rows; ++n) {
    Vec right[VECS];
    UNROLL for (int v = 0; v < VECS; ++v) right[v] = load(x + n * ldx + v * kLanes);
    UNROLL for (int i = 0; i < RANKS; ++i) {
      const Vec left = spread(z[n * ldz + i]);
      UNROLL for (int v = 0; v < VECS; ++v) sum[i][v] += left * right[v];
    }
  }
  UNROLL for (int i = 0; i < RANKS; ++i) {
    UNROLL for (int v = 0; v < VECS; ++v) store(g + i * ldg + v * kLanes, sum[i][v]);
  }
}

template <int RANKS>
inline void outer_ranks(
    const float* z, int64_t ldz, const float* x, int64_t ldx, int64_t rows, int64_t d, float* g, int64_t ldg) {
  constexpr int kVecs = kSums / RANKS < 4 ? kSums / RANKS : 4;
  int64_t c = 0;
  for (; c + kVecs * kLanes <= d; c += kVecs * kLanes) {
    outer_tile<RANKS, kVecs>(z, ldz, x + c, ldx, rows, g + c, ldg);
  }
  for (; c + kLanes <= d; c += kLanes) outer_tile<RANKS, 1>(z, ldz, x + c, ldx, rows, g + c, ldg);
  for (; c < d; ++c) {
    UNROLL for (int i = 0; i < RANKS; ++i) {
      float sum = g[i * ldg + c];
      for (int64_t n = 0; n < rows; ++n) sum += z[n * ldz + i] * x[n * ldx + c];
      g[i * ldg + c] = sum;
    }
  }
}

template <size_t... R>
constexpr auto projections(std::index_sequence<R...>) { return std::array{project_ranks<R + 1>...}; }
template <size_t... R>
constexpr auto outers(std::index_sequence<R...>) { return std::array{outer_ranks<R + 1>...}; }

// z (rows, r) = x (rows, d) · fᵀ, f (r, d).
inline void project(
    const float* x, int64_t ldx, int64_t rows, int64_t d, const float* f, int64_t ldf, float* z, int64_t ldz,
    int64_t r) {
  constexpr auto kWork = projections(std::make_index_sequence<kRanks>());
  for (int64_t i = 0; i < r; i += kRanks) {
    kWork[std::min(kRanks, r - i) - 1](x, ldx, rows, d, f + i * ldf, ldf, z + i, ldz);
  }
}

// g (r, d) += zᵀ x, z (rows, r), x (rows, d).
inline void outer(
    const float* z, int64_t ldz, const float* x, int64_t ldx, int64_t rows, int64_t r, int64_t d, float* g,
    int64_t ldg) {
  constexpr auto kWork = outers(std::make_index_sequence<kRanks>());
  for (int64_t i = 0; i < r; i += kRanks) {
    kWork[std::min(kRanks, r - i) - 1](z + i, ldz, x, ldx, rows, d, g + i * ldg, ldg);
  }
}

}  // namespace rankalloc::skinny
