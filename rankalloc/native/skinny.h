// Products of a tall matrix with an adapter's few rows or columns, float32, on one core.
//
// A BLAS is made for products whose sides are all long. With r of a dozen, what counts is that every row of the
// tall matrix is read once, while it is in the cache, and that r accumulators stay in registers. The caller passes
// blocks of rows that fit the second-level cache; a tile of rows and columns is then summed in registers.
//
// Every function adds in an order that depends on its arguments' shapes alone.

#pragma once

#include <algorithm>
#include <cstdint>

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

inline int64_t padded(int64_t r) { return (r + kLanes - 1) / kLanes * kLanes; }

// z (ROWS, columns) = x (ROWS, d) · f (d, columns), columns of f padded to whole vectors; every pointer is followed
// by the distance of its rows.
template <int ROWS, int VECS>
inline void project_tile(
    const float* __restrict x, int64_t ldx, int64_t d, const float* __restrict f, int64_t ldf, float* __restrict z,
    int64_t ldz, int64_t columns) {
  Vec sum[ROWS][VECS] = {};
  for (int64_t k = 0; k < d; ++k) {
    Vec right[VECS];
    for (int v = 0; v < VECS; ++v) right[v] = load(f + k * ldf + v * kLanes);
    for (int i = 0; i < ROWS; ++i) {
      const Vec left = spread(x[i * ldx + k]);
      for (int v = 0; v < VECS; ++v) sum[i][v] += left * right[v];
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < VECS; ++v) {
      float* to = z + i * ldz + v * kLanes;
      const int64_t n = columns - v * kLanes;
      if (n >= kLanes) {
        store(to, sum[i][v]);
      } else {
        for (int64_t c = 0; c < n; ++c) to[c] = sum[i][v][c];
      }
    }
  }
}

template <int VECS>
inline void project_columns(
    const float* x, int64_t ldx, int64_t rows, int64_t d, const float* f, int64_t ldf, float* z, int64_t ldz,
    int64_t columns) {
  constexpr int kRows = VECS == 1 ? 16 : VECS == 2 ? 10 : 8;
  int64_t n = 0;
  for (; n + kRows <= rows; n += kRows) {
    project_tile<kRows, VECS>(x + n * ldx, ldx, d, f, ldf, z + n * ldz, ldz, columns);
  }
  for (; n < rows; ++n) project_tile<1, VECS>(x + n * ldx, ldx, d, f, ldf, z + n * ldz, ldz, columns);
}

// z (rows, r) = x (rows, d) · f (d, r), rows of f padded(r) long, zeros at their ends.
inline void project(
    const float* x, int64_t ldx, int64_t rows, int64_t d, const float* f, int64_t ldf, float* z, int64_t ldz,
    int64_t r) {
  for (int64_t c = 0; c < r; c += 3 * kLanes) {
    const int64_t columns = std::min(3 * kLanes, r - c);
    const auto work = columns > 2 * kLanes ? project_columns<3> : columns > kLanes ? project_columns<2> : project_columns<1>;
    work(x, ldx, rows, d, f + c, ldf, z + c, ldz, columns);
  }
}

template <int ROWS, int VECS>
inline void expand_tile(
    const float* __restrict z, int64_t ldz, int64_t r, const float* __restrict f, int64_t ldf, const float* start,
    float* __restrict y, int64_t ldy) {
  Vec sum[ROWS][VECS];
  for (int v = 0; v < VECS; ++v) {
    const Vec first = start ? load(start + v * kLanes) : Vec{};
    for (int i = 0; i < ROWS; ++i) sum[i][v] = first;
  }
  for (int64_t k = 0; k < r; ++k) {
    Vec right[VECS];
    for (int v = 0; v < VECS; ++v) right[v] = load(f + k * ldf + v * kLanes);
    for (int i = 0; i < ROWS; ++i) {
      const Vec left = spread(z[i * ldz + k]);
      for (int v = 0; v < VECS; ++v) sum[i][v] += left * right[v];
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < VECS; ++v) store(y + i * ldy + v * kLanes, sum[i][v]);
  }
}

template <int ROWS>
inline void expand_rows(
    const float* z, int64_t ldz, int64_t r, const float* f, int64_t ldf, const float* start, float* y, int64_t ldy,
    int64_t d) {
  constexpr int kVecs = 4;
  const auto at = [start](int64_t c) { return start ? start + c : nullptr; };
  int64_t c = 0;
  for (; c + kVecs * kLanes <= d; c += kVecs * kLanes) {
    expand_tile<ROWS, kVecs>(z, ldz, r, f + c, ldf, at(c), y + c, ldy);
  }
  for (; c + kLanes <= d; c += kLanes) expand_tile<ROWS, 1>(z, ldz, r, f + c, ldf, at(c), y + c, ldy);
  for (; c < d; ++c) {
    for (int i = 0; i < ROWS; ++i) {
      float sum = start ? start[c] : 0.0f;
      for (int64_t k = 0; k < r; ++k) sum += z[i * ldz + k] * f[k * ldf + c];
      y[i * ldy + c] = sum;
    }
  }
}

// y (rows, d) = z (rows, r) · f (r, d) + start (d) in every row, where there is a start.
inline void expand(
    const float* z, int64_t ldz, int64_t rows, int64_t r, const float* f, int64_t ldf, const float* start, float* y,
    int64_t ldy, int64_t d) {
  constexpr int kRows = 6;
  int64_t n = 0;
  for (; n + kRows <= rows; n += kRows) expand_rows<kRows>(z + n * ldz, ldz, r, f, ldf, start, y + n * ldy, ldy, d);
  for (; n < rows; ++n) expand_rows<1>(z + n * ldz, ldz, r, f, ldf, start, y + n * ldy, ldy, d);
}

template <int RANKS, int VECS>
inline void outer_tile(
    const float* __restrict z, int64_t ldz, const float* __restrict x, int64_t ldx, int64_t rows, float* __restrict g,
    int64_t ldg) {
  Vec sum[RANKS][VECS];
  for (int i = 0; i < RANKS; ++i) {
    for (int v = 0; v < VECS; ++v) sum[i][v] = load(g + i * ldg + v * kLanes);
  }
  for (int64_t n = 0; n < rows; ++n) {
    Vec right[VECS];
    for (int v = 0; v < VECS; ++v) right[v] = load(x + n * ldx + v * kLanes);
    for (int i = 0; i < RANKS; ++i) {
      const Vec left = spread(z[n * ldz + i]);
      for (int v = 0; v < VECS; ++v) sum[i][v] += left * right[v];
    }
  }
  for (int i = 0; i < RANKS; ++i) {
    for (int v = 0; v < VECS; ++v) store(g + i * ldg + v * kLanes, sum[i][v]);
  }
}

template <int RANKS>
inline void outer_ranks(
    const float* z, int64_t ldz, const float* x, int64_t ldx, int64_t rows, int64_t d, float* g, int64_t ldg) {
  constexpr int kVecs = RANKS > 6 ? 2 : 4;
  int64_t c = 0;
  for (; c + kVecs * kLanes <= d; c += kVecs * kLanes) {
    outer_tile<RANKS, kVecs>(z, ldz, x + c, ldx, rows, g + c, ldg);
  }
  for (; c + kLanes <= d; c += kLanes) outer_tile<RANKS, 1>(z, ldz, x + c, ldx, rows, g + c, ldg);
  for (; c < d; ++c) {
    for (int i = 0; i < RANKS; ++i) {
      float sum = g[i * ldg + c];
      for (int64_t n = 0; n < rows; ++n) sum += z[n * ldz + i] * x[n * ldx + c];
      g[i * ldg + c] = sum;
    }
  }
}

// g (r, d) += zᵀ (r, rows) · x (rows, d).
inline void outer(
    const float* z, int64_t ldz, const float* x, int64_t ldx, int64_t rows, int64_t r, int64_t d, float* g,
    int64_t ldg) {
  using Work = void (*)(const float*, int64_t, const float*, int64_t, int64_t, int64_t, float*, int64_t);
  constexpr int64_t kMost = 12;
  constexpr Work kWork[kMost + 1] = {
      nullptr, outer_ranks<1>, outer_ranks<2>, outer_ranks<3>, outer_ranks<4>, outer_ranks<5>, outer_ranks<6>,
      outer_ranks<7>, outer_ranks<8>, outer_ranks<9>, outer_ranks<10>, outer_ranks<11>, outer_ranks<12>};
  for (int64_t i = 0; i < r; i += kMost) {
    kWork[std::min(kMost, r - i)](z + i, ldz, x, ldx, rows, d, g + i * ldg, ldg);
  }
}

}  // namespace rankalloc::skinny
