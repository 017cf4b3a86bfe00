// What the kernels for CPUs share: vectors of channels, and one row of a depthwise convolution of them.
//
// A block is LANES neighboring channels, side by side in a vector. A row of a block is padded: `size / 2` vectors of
// zeros before its tokens and at least as many after them. WIDE neighboring outputs stay in registers for all taps. Taps
// that read beyond the upper and lower edge of the grid are left out. Where the side of the kernel is known to the
// compiler (SIZE; 0 for any) so are those beyond the left edge, and the right one if a row of registers ends there.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Order __attribute__((vector_size(LANES * sizeof(int32_t))));

#define INLINE inline __attribute__((always_inline))

namespace {

struct Buffer {
  explicit Buffer(int64_t vectors)
      : data(static_cast<Lanes*>(::operator new(vectors * sizeof(Lanes), std::align_val_t(64), std::nothrow))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Lanes* data;
};

#if defined(__clang__)
INLINE Lanes pick(Lanes a, Lanes b, Order order) {
  Lanes out;
  for (int i = 0; i < LANES; ++i) out[i] = order[i] < LANES ? a[order[i]] : b[order[i] - LANES];
  return out;
}
#else
INLINE Lanes pick(Lanes a, Lanes b, Order order) { return __builtin_shuffle(a, b, order); }
#endif

// Turns LANES rows of LANES: blocks of STEP x STEP beside the diagonal change places, then those of twice the size.
template <int STEP>
INLINE void turn(Lanes* rows) {
  Order upper = {}, lower = {};
  for (int i = 0; i < LANES; ++i) {
    upper[i] = i & STEP ? LANES + i - STEP : i;
    lower[i] = i & STEP ? LANES + i : i + STEP;
  }
  for (int i = 0; i < LANES; ++i) {
    if (i & STEP) continue;
    const Lanes a = rows[i], b = rows[i + STEP];
    rows[i] = pick(a, b, upper);
    rows[i + STEP] = pick(a, b, lower);
  }
  if constexpr (2 * STEP < LANES) turn<2 * STEP>(rows);
}

// Rows first .. first + LANES of a matrix, turned: column k is the vector to[k * step], 0 past the last of the `rows`.
void pack(const float* matrix, int64_t rows, int64_t columns, int64_t first, Lanes* to, int64_t step) {
  const int64_t lanes = std::min<int64_t>(LANES, rows - first);
  const float* from = matrix + first * columns;
  int64_t k = 0;
  for (; lanes == LANES && k + LANES <= columns; k += LANES) {
    Lanes tile[LANES];
    for (int i = 0; i < LANES; ++i) std::memcpy(&tile[i], from + i * columns + k, sizeof(Lanes));
    turn<1>(tile);
    for (int i = 0; i < LANES; ++i) to[(k + i) * step] = tile[i];
  }
  for (; k < columns; ++k) {
    Lanes column = {};
    for (int64_t i = 0; i < lanes; ++i) column[i] = from[i * columns + k];
    to[k * step] = column;
  }
}

template <int KX, int SIZE, int WIDE, bool LEFT, bool RIGHT, int... J>
INLINE void tap(const Lanes* row, Lanes weight, Lanes* sum, std::integer_sequence<int, J...>) {
  // output J of the tile reads its token J + KX - SIZE / 2
  ((!(LEFT && J + KX < SIZE / 2) && !(RIGHT && J + KX - SIZE / 2 >= WIDE) ? void(sum[J] += row[J + KX] * weight)
                                                                          : void()),
   ...);
}

template <int SIZE, int WIDE, bool LEFT, bool RIGHT, int... KX>
INLINE void row_of_taps(const Lanes* row, const Lanes* taps, Lanes* sum, std::integer_sequence<int, KX...>) {
  (tap<KX, SIZE, WIDE, LEFT, RIGHT>(row, taps[KX], sum, std::make_integer_sequence<int, WIDE>()), ...);
}

// WIDE outputs of a row, from x0 on, summed over rows ky0 .. ky1 of the kernel; `rows[ky]` is the row that row ky reads.
// LEFT, RIGHT: the tile begins, or ends, at the edge of the grid.
template <int WIDE, int SIZE, bool LEFT, bool RIGHT>
void tile(const Lanes* const* rows, int64_t ky0, int64_t ky1, int64_t size, int64_t x0, const Lanes* taps, Lanes* sum) {
  Lanes s[WIDE];
  for (int j = 0; j < WIDE; ++j) s[j] = sum[j];
  for (int64_t ky = ky0; ky < ky1; ++ky) {
    if constexpr (SIZE > 0) {
      row_of_taps<SIZE, WIDE, LEFT, RIGHT>(rows[ky] + x0, taps + ky * SIZE, s, std::make_integer_sequence<int, SIZE>());
    } else {
      const Lanes *row = rows[ky] + x0, *weight = taps + ky * size;
      for (int64_t kx = 0; kx < size; ++kx, ++row, ++weight) {
        const Lanes w = *weight;
        for (int j = 0; j < WIDE; ++j) s[j] += row[j] * w;
      }
    }
  }
  for (int j = 0; j < WIDE; ++j) sum[j] = s[j];
}

// A row of outputs of a block, one token every `token` floats of `out`; times what stands there where `multiply`.
template <int WIDE, int SIZE>
void convolve_row(const Lanes* const* rows, int64_t ky0, int64_t ky1, int64_t size, int64_t width, const Lanes* taps,
                  Lanes bias, float* out, int64_t token, int64_t lanes, bool multiply) {
  for (int64_t x0 = 0; x0 < width; x0 += WIDE) {
    const int64_t wide = std::min<int64_t>(WIDE, width - x0);
    Lanes sum[WIDE];
    for (int j = 0; j < WIDE; ++j) sum[j] = bias;
    const bool left = x0 == 0, right = x0 + WIDE == width;
    if (left && right) tile<WIDE, SIZE, true, true>(rows, ky0, ky1, size, x0, taps, sum);
    else if (left) tile<WIDE, SIZE, true, false>(rows, ky0, ky1, size, x0, taps, sum);
    else if (right) tile<WIDE, SIZE, false, true>(rows, ky0, ky1, size, x0, taps, sum);
    else tile<WIDE, SIZE, false, false>(rows, ky0, ky1, size, x0, taps, sum);
    float* to = out + x0 * token;
    if (lanes == LANES) {
      for (int64_t j = 0; j < wide; ++j, to += token) {
        Lanes there;
        if (multiply) std::memcpy(&there, to, sizeof(Lanes)), sum[j] *= there;
        std::memcpy(to, &sum[j], sizeof(Lanes));
      }
    } else {
      for (int64_t j = 0; j < wide; ++j, to += token) {
        Lanes there = {};
        if (multiply) std::memcpy(&there, to, lanes * sizeof(float)), sum[j] *= there;
        std::memcpy(to, &sum[j], lanes * sizeof(float));
      }
    }
  }
}

using ConvolveRow = void (*)(const Lanes* const*, int64_t, int64_t, int64_t, int64_t, const Lanes*, Lanes, float*,
                             int64_t, int64_t, bool);

// The number of outputs in registers that leaves the fewest unused in a row of `width`, the most first. 14 need more
// than 16 registers once the compiler reads ahead.
int64_t best_width(int64_t width) {
  int64_t best = 0, waste = INT64_MAX;
  for (int64_t wide : {14, 12, 10, 8, 7, 4}) {
    const int64_t unused = (width + wide - 1) / wide * wide - width;
    if (unused < waste && (wide < 14 || LANES == 16)) best = wide, waste = unused;
  }
  return best;
}

// Vectors of a padded row, so that the last outputs of a row, used or not, read within it.
int64_t padded(int64_t width, int64_t size) {
  const int64_t wide = best_width(width);
  return (width + wide - 1) / wide * wide + size - 1;
}

template <int SIZE>
ConvolveRow of_width(int64_t wide) {
  switch (wide) {
    case 4: return convolve_row<4, SIZE>;
    case 7: return convolve_row<7, SIZE>;
    case 8: return convolve_row<8, SIZE>;
    case 10: return convolve_row<10, SIZE>;
    case 12: return convolve_row<12, SIZE>;
    default: return convolve_row<14, SIZE>;
  }
}

ConvolveRow row_convolution(int64_t width, int64_t size) {
  const int64_t wide = best_width(width);
  switch (size) {
    case 7: return of_width<7>(wide);
    case 11: return of_width<11>(wide);
    default: return of_width<0>(wide);
  }
}

}  // namespace
