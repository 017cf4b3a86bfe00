// Depthwise 2-D convolution of tokens, channels last, float32: forward and gradient of the weights.
//
// x and out are (B, H * W, C) with any distance between tokens (channels side by side); the kernel is K x K, stride 1,
// zeros beyond the edges. A block of LANES channels is copied to a padded buffer and convolved there; the buffer holds
// a strip of rows that fits the second-level cache.

#include <memory>

#include "lanes.hpp"

namespace {

constexpr int64_t STRIP_BYTES = 192 * 1024;
constexpr int TAPS = 12;  // of a row, whose gradients stay in registers

struct Image {
  int64_t batch, height, width, channels, size;  // size: of the kernel
  int64_t half() const { return size / 2; }
  int64_t blocks() const { return (channels + LANES - 1) / LANES; }
  int64_t strip(int64_t row) const {  // rows of output whose input fits, `row` vectors each
    int64_t rows = STRIP_BYTES / (row * LANES * int64_t(sizeof(float))) - (size - 1);
    return std::min(height, std::max<int64_t>(rows, 4));
  }
};

struct Tokens {
  const float* data;
  int64_t image, token;  // distances, in floats
};

// Rows first .. first + rows of a block of channels, each shifted right by `margin`, zeros round them.
void load(const Image& im, const Tokens& x, int64_t b, int64_t block, int64_t first, int64_t rows, int64_t margin,
          int64_t row_vectors, Lanes* buffer) {
  const int64_t start = block * LANES, lanes = std::min<int64_t>(LANES, im.channels - start);
  std::memset(static_cast<void*>(buffer), 0, rows * row_vectors * sizeof(Lanes));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t y = first + r;
    if (y < 0 || y >= im.height) continue;
    const float* from = x.data + b * x.image + y * im.width * x.token + start;
    Lanes* to = buffer + r * row_vectors + margin;
    if (lanes == LANES) {
      for (int64_t i = 0; i < im.width; ++i) std::memcpy(to + i, from + i * x.token, sizeof(Lanes));
    } else {
      for (int64_t i = 0; i < im.width; ++i) std::memcpy(to + i, from + i * x.token, lanes * sizeof(float));
    }
  }
}

}  // namespace

extern "C" {

// out = bias + x * weight, or, where `multiply`, what stands in out times that. weight is (C, size, size), turned by 180
// degrees where `flip` (the gradient of x). bias may be null; that of image b is (C,) from bias + b * bias_image. Gives
// 0, or 1 if memory ran out.
int attnzoo_depthwise(const float* x, int64_t x_image, int64_t x_token, const float* weight, const float* bias,
                      int64_t bias_image, float* out, int64_t out_image, int64_t out_token, int64_t batch,
                      int64_t height, int64_t width, int64_t channels, int64_t size, int flip, int multiply,
                      int threads) {
  const Image im{batch, height, width, channels, size};
  const Tokens tokens{x, x_image, x_token};
  const int64_t row_vectors = padded(width, size), strip = im.strip(row_vectors), half = im.half();
  const int64_t strips = (height + strip - 1) / strip, blocks = im.blocks(), area = size * size;
  const ConvolveRow convolve = row_convolution(width, size);
  Buffer taps(blocks * area);
  if (!taps.data) return 1;
  for (int64_t block = 0; block < blocks; ++block) {
    Lanes* to = taps.data + block * area;
    flip ? pack(weight, channels, area, block * LANES, to + area - 1, -1)
         : pack(weight, channels, area, block * LANES, to, 1);
  }
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    Buffer buffer((strip + size - 1) * row_vectors);
    std::unique_ptr<const Lanes*[]> under(new (std::nothrow) const Lanes*[size]);  // the row that a row of taps reads
    const bool ready = buffer.data && under;
    failed = !ready;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < batch * blocks * strips; ++task) {
      if (!ready) continue;  // every thread must come to the loop
      // blocks of the same strip in a row: their channels share lines of the cache
      const int64_t b = task / (blocks * strips), block = task % blocks, first = task / blocks % strips * strip;
      const int64_t rows = std::min(strip, height - first), start = block * LANES;
      const int64_t lanes = std::min<int64_t>(LANES, channels - start);
      load(im, tokens, b, block, first - half, rows + size - 1, half, row_vectors, buffer.data);
      Lanes start_at = {};
      if (bias) std::memcpy(&start_at, bias + b * bias_image + start, lanes * sizeof(float));
      for (int64_t y = first; y < first + rows; ++y) {
        const int64_t ky0 = std::max<int64_t>(0, half - y), ky1 = std::min(size, height + half - y);
        for (int64_t ky = ky0; ky < ky1; ++ky) under[ky] = buffer.data + (y - first + ky) * row_vectors;
        convolve(under.get(), ky0, ky1, size, width, taps.data + block * area, start_at,
                 out + b * out_image + y * width * out_token + start, out_token, lanes, multiply != 0);
      }
    }
  }
  return failed;
}

// Gradient of the weight (C, size, size), from x and the gradient of the output.
int attnzoo_depthwise_weight(const float* x, int64_t x_image, int64_t x_token, const float* grad, int64_t grad_image,
                             int64_t grad_token, float* grad_weight, int64_t batch, int64_t height, int64_t width,
                             int64_t channels, int64_t size, int threads) {
  const Image im{batch, height, width, channels, size};
  const Tokens tokens{x, x_image, x_token}, grads{grad, grad_image, grad_token};
  const int64_t row_vectors = width + size - 1 + TAPS, strip = im.strip(row_vectors);
  const int64_t strips = (height + strip - 1) / strip, blocks = im.blocks(), area = size * size;
  int failed = 0;
  // a block of channels belongs to one thread, which sums over images and strips in one order
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    Buffer inputs((strip + size - 1) * row_vectors), outputs(strip * width), sums(area);
    const bool ready = inputs.data && outputs.data && sums.data;
    failed = !ready;
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      if (!ready) continue;  // every thread must come to the loop
      std::memset(static_cast<void*>(sums.data), 0, area * sizeof(Lanes));
      for (int64_t part = 0; part < batch * strips; ++part) {
        const int64_t b = part / strips, first = part % strips * strip, rows = std::min(strip, height - first);
        load(im, tokens, b, block, first - im.half(), rows + size - 1, im.half(), row_vectors, inputs.data);
        load(im, grads, b, block, first, rows, 0, width, outputs.data);
        for (int64_t ky = 0; ky < size; ++ky) {
          for (int64_t k0 = 0; k0 < size; k0 += TAPS) {
            Lanes sum[TAPS] = {};
            for (int64_t y = 0; y < rows; ++y) {
              const Lanes* g = outputs.data + y * width;
              const Lanes* row = inputs.data + (y + ky) * row_vectors + k0;
              for (int64_t i = 0; i < width; ++i) {
                for (int j = 0; j < TAPS; ++j) sum[j] += row[i + j] * g[i];
              }
            }
            for (int64_t j = 0; j < std::min<int64_t>(TAPS, size - k0); ++j) sums.data[ky * size + k0 + j] += sum[j];
          }
        }
      }
      const int64_t start = block * LANES, lanes = std::min<int64_t>(LANES, channels - start);
      const float* from = reinterpret_cast<const float*>(sums.data);
      for (int64_t c = 0; c < lanes; ++c) {
        for (int64_t k = 0; k < area; ++k) grad_weight[(start + c) * area + k] = from[k * LANES + c];
      }
    }
  }
  return failed;
}

}  // extern "C"
