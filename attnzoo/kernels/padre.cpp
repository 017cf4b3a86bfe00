// A layer of PADRe without gradients, float32: each map over channels is computed a few rows ahead of the convolution
// that reads it, and each convolution is multiplied into the product where it ends, so that no Y_i is ever in memory
// whole.
//
// A layer is a list of factors: a map over channels (C, C), then a depthwise convolution of size x size, each with a
// bias. A factor reads the input or what the stage before gave. The first of a stage is written to the stage's output,
// the others are multiplied into it. Stages come one after the other; each is cut into pairs of blocks of channels,
// which need nothing of each other, and strips of rows. A task goes down its strip: rows are mapped into a ring of rows,
// and those whose input is there are convolved.
//
// Prefix tokens take part linearly: a mapped one becomes `own` times itself plus `to_prefix` times the mean of all
// mapped tokens plus the bias, and `to_patches` times the mean of the mapped prefix is added to every patch.

#include <memory>
#include <numeric>

#include "lanes.hpp"

struct Factor {
  const float *map, *map_bias, *taps, *bias;      // (C, C) as (out, in), (C,), (C, size, size), (C,)
  const float *own, *to_prefix, *to_patches;      // (C,) each; unused without a prefix
  int64_t stage, from_input;
};

namespace {

constexpr int64_t PAIR = 2;                 // blocks of channels that are mapped together
constexpr int TILE = LANES == 16 ? 12 : 6;  // tokens whose 2 * TILE sums stay in registers
constexpr int64_t LINE = 16;                // floats in a line of the cache
constexpr int64_t LEAST_STRIP = 16;         // rows of output: size - 1 more are mapped for each strip

typedef Lanes Pair[PAIR];

struct Layer {
  int64_t height, width, channels, size, prefix;
  int64_t patches() const { return height * width; }
  int64_t half() const { return size / 2; }
  int64_t area() const { return size * size; }
  int64_t row() const { return padded(width, size); }
  int64_t blocks() const { return (channels + LANES - 1) / LANES; }
  int64_t pairs() const { return (blocks() + PAIR - 1) / PAIR; }
  int64_t chunk() const { return TILE / std::gcd(width, int64_t(TILE)); }  // rows that fill tiles of tokens
  int64_t ring_rows() const { return size - 1 + chunk(); }
};

struct Tokens {
  const float* data;
  int64_t distance;  // from one to the next, in floats
  Tokens from(int64_t token) const { return {data + token * distance, distance}; }
};

// The pair's part of a vector (C,), 0 past channel C.
void read(const float* vector, int64_t channels, int64_t pair, Pair& part) {
  const int64_t start = pair * PAIR * LANES;
  part[0] = part[1] = Lanes{};
  std::memcpy(part, vector + start, std::min<int64_t>(PAIR * LANES, channels - start) * sizeof(float));
}

template <int COUNT>
void map_tokens(const Tokens& x, int64_t channels, const Pair* panel, const Pair& bias, Pair* mapped) {
  Pair sum[COUNT];
  for (int t = 0; t < COUNT; ++t) sum[t][0] = bias[0], sum[t][1] = bias[1];
  for (int64_t k = 0; k < channels; ++k) {
    if (k % LINE == 0) {  // have what is mapped next come near
      for (int t = 0; t < COUNT; ++t) __builtin_prefetch(x.data + (t + COUNT) * x.distance + k);
    }
    const Lanes first = panel[k][0], second = panel[k][1];
    for (int t = 0; t < COUNT; ++t) {
      const float value = x.data[t * x.distance + k];
      sum[t][0] += first * value;
      sum[t][1] += second * value;
    }
  }
  for (int t = 0; t < COUNT; ++t) mapped[t][0] = sum[t][0], mapped[t][1] = sum[t][1];
}

// Maps rows from .. to of the grid into the ring, where row y lies at y % ring_rows, the pair's first block before its
// second.
void map_rows(const Layer& l, const Tokens& x, int64_t from, int64_t to, const Pair* panel, const Pair& bias,
              Lanes* ring) {
  const int64_t row = l.row(), end = to * l.width;
  int64_t y = from, column = 0;
  for (int64_t t = from * l.width; t < end;) {
    const Tokens here = x.from(t);
    Pair mapped[TILE];
    int64_t count = 1;
    if (end - t >= TILE) map_tokens<TILE>(here, l.channels, panel, bias, mapped), count = TILE;
    else if (end - t >= 4) map_tokens<4>(here, l.channels, panel, bias, mapped), count = 4;
    else map_tokens<1>(here, l.channels, panel, bias, mapped);
    for (int64_t i = 0; i < count; ++i) {
      Lanes* at = ring + y % l.ring_rows() * PAIR * row + l.half() + column;
      at[0] = mapped[i][0];
      at[row] = mapped[i][1];
      if (++column == l.width) column = 0, ++y;
    }
    t += count;
  }
}

// Convolves rows from .. to of a pair of blocks, whose input is in the ring. `under` has room for a pointer a row of
// taps; `out` is the pair's first channel of token 0.
void convolve_rows(const Layer& l, ConvolveRow convolve, int64_t from, int64_t to, int64_t pair, const Lanes* ring,
                   const Lanes* taps, const Pair& bias, const Lanes** under, float* out, bool multiply) {
  const int64_t row = l.row(), half = l.half();
  for (int64_t p = 0; p < PAIR && pair * PAIR + p < l.blocks(); ++p) {
    const int64_t lanes = std::min<int64_t>(LANES, l.channels - (pair * PAIR + p) * LANES);
    for (int64_t y = from; y < to; ++y) {
      const int64_t ky0 = std::max<int64_t>(0, half - y), ky1 = std::min(l.size, l.height + half - y);
      for (int64_t ky = ky0; ky < ky1; ++ky) under[ky] = ring + ((y + ky - half) % l.ring_rows() * PAIR + p) * row;
      convolve(under, ky0, ky1, l.size, l.width, taps + p * l.area(), bias[p],
               out + y * l.width * l.channels + p * LANES, l.channels, lanes, multiply);
    }
  }
}

// The sum (C,) of an image's patches.
void sum_tokens(const Tokens& x, int64_t count, int64_t channels, double* wide, float* sum) {
  std::fill(wide, wide + channels, 0.0);
  for (int64_t t = 0; t < count; ++t) {
    const float* token = x.data + t * x.distance;
    for (int64_t c = 0; c < channels; ++c) wide[c] += token[c];
  }
  for (int64_t c = 0; c < channels; ++c) sum[c] = float(wide[c]);
}

// Maps and mixes the prefix of `x`, the sum of whose patches is `patch_sum`, and adds what patches get of it to `bias`.
// `out`, the pair's first channel of token 0, is left alone where null.
void mix_prefix(const Layer& l, const Factor& factor, const Tokens& x, const float* patch_sum, int64_t pair,
                const Pair* panel, const Pair& map_bias, Pair& bias, float* out, bool multiply) {
  const int64_t columns = std::min<int64_t>(PAIR * LANES, l.channels - pair * PAIR * LANES);
  const Pair none = {};
  Pair own, to_prefix, to_patches, mapped, patches, head = {};
  read(factor.own, l.channels, pair, own);
  read(factor.to_prefix, l.channels, pair, to_prefix);
  read(factor.to_patches, l.channels, pair, to_patches);
  map_tokens<1>({patch_sum, l.channels}, l.channels, panel, none, &patches);
  for (int64_t t = 0; t < l.prefix; ++t) {
    map_tokens<1>(x.from(t), l.channels, panel, map_bias, &mapped);
    for (int p = 0; p < PAIR; ++p) head[p] += mapped[p];
  }
  for (int64_t t = 0; out && t < l.prefix; ++t) {
    map_tokens<1>(x.from(t), l.channels, panel, map_bias, &mapped);
    for (int p = 0; p < PAIR; ++p) {
      const Lanes all = head[p] + patches[p] + map_bias[p] * float(l.patches());
      mapped[p] = own[p] * mapped[p] + to_prefix[p] * (all / float(l.prefix + l.patches())) + bias[p];
    }
    Pair there = {};
    float* to = out + t * l.channels;
    std::memcpy(there, to, columns * sizeof(float));
    for (int p = 0; multiply && p < PAIR; ++p) mapped[p] *= there[p];
    std::memcpy(to, mapped, columns * sizeof(float));
  }
  for (int p = 0; p < PAIR; ++p) bias[p] += to_patches[p] * (head[p] / float(l.prefix));
}

struct Call {
  Layer layer;
  const Factor* factors;
  int64_t count;
  ConvolveRow convolve;
  const Lanes *panels, *taps;                // of each factor and pair
  int64_t panel_size, taps_size, ring_size;  // in vectors
  const Pair* panel(int64_t factor, int64_t pair) const {
    return reinterpret_cast<const Pair*>(panels + (factor * layer.pairs() + pair) * panel_size);
  }
};

// What one stage reads and writes of one image.
struct Image {
  Tokens input, before;
  const float *input_sum, *before_sum;  // of the patches; unused without a prefix
  float* out;
};

// Of a thread.
struct Scratch {
  Lanes *rings, *biases;  // of each factor: its ring; bias of its map, and of its convolution
  const Lanes** under;    // the row that each row of taps reads
};

// Rows first .. last of a pair of blocks, through all factors of a stage; the prefix with the first of them.
void go_down(const Call& call, int64_t stage, const Image& image, int64_t pair, int64_t first, int64_t last,
             const Scratch& scratch) {
  const Layer& l = call.layer;
  float* out = image.out + pair * PAIR * LANES;
  Pair* biases = reinterpret_cast<Pair*>(scratch.biases);
  bool multiply = false;
  for (int64_t f = 0; f < call.count; ++f) {
    const Factor& factor = call.factors[f];
    if (factor.stage != stage) continue;
    read(factor.map_bias, l.channels, pair, biases[2 * f]);
    read(factor.bias, l.channels, pair, biases[2 * f + 1]);
    if (l.prefix) {
      mix_prefix(l, factor, factor.from_input ? image.input : image.before,
                 factor.from_input ? image.input_sum : image.before_sum, pair, call.panel(f, pair), biases[2 * f],
                 biases[2 * f + 1], first == 0 ? out : nullptr, multiply);
    }
    multiply = true;
  }
  int64_t mapped = std::max<int64_t>(0, first - l.half());  // rows before it are in the rings
  for (int64_t y = first; y < last; y += l.chunk()) {
    const int64_t end = std::min(y + l.chunk(), last), needed = std::min(l.height, end + l.half());
    multiply = false;
    for (int64_t f = 0; f < call.count; ++f) {
      const Factor& factor = call.factors[f];
      if (factor.stage != stage) continue;
      const Tokens& source = factor.from_input ? image.input : image.before;
      Lanes* ring = scratch.rings + f * call.ring_size;
      map_rows(l, source.from(l.prefix), mapped, needed, call.panel(f, pair), biases[2 * f], ring);
      convolve_rows(l, call.convolve, y, end, pair, ring, call.taps + (f * l.pairs() + pair) * call.taps_size,
                    biases[2 * f + 1], scratch.under, out + l.prefix * l.channels, multiply);
      multiply = true;
    }
    mapped = needed;
  }
}

}  // namespace

// x is (B, prefix + H * W, C), with any distance between images and between tokens; out and spare are contiguous and as
// large. A stage needs the whole output of the one before: they use out and spare in turn, the last one out. spare may
// be null where there is one stage. Gives 0, or 1 if memory ran out.
extern "C" int attnzoo_padre(const float* x, int64_t x_image, int64_t x_token, const Factor* factors, int64_t count,
                             float* spare, float* out, int64_t batch, int64_t prefix, int64_t height, int64_t width,
                             int64_t channels, int64_t size, int threads) {
  const Layer l{height, width, channels, size, prefix};
  const int64_t pairs = l.pairs(), image = (prefix + l.patches()) * channels, stages = factors[count - 1].stage + 1;
  // as many strips as give each thread two tasks
  const int64_t wanted = threads == 1 ? 1 : (2 * threads + batch * pairs - 1) / (batch * pairs);
  const int64_t strips = std::max<int64_t>(1, std::min(wanted, height / LEAST_STRIP));
  const int64_t strip = (height + strips - 1) / strips;
  const int64_t panel_size = channels * PAIR, taps_size = PAIR * l.area();  // of a factor and a pair, in vectors
  const int64_t ring_size = l.ring_rows() * PAIR * l.row();
  Buffer panels(count * pairs * panel_size), taps(count * pairs * taps_size);
  std::unique_ptr<float[]> sums(new (std::nothrow) float[2 * batch * channels]);  // of the patches of both sources
  if (!panels.data || !taps.data || !sums) return 1;
  const ConvolveRow convolve = row_convolution(width, size);
  const Call call{l, factors, count, convolve, panels.data, taps.data, panel_size, taps_size, ring_size};
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count * pairs; ++i) {
      const Factor& factor = factors[i / pairs];
      Lanes* panel = panels.data + i * panel_size;
      std::memset(static_cast<void*>(panel), 0, panel_size * sizeof(Lanes));
      for (int64_t p = 0; p < PAIR && i % pairs * PAIR + p < l.blocks(); ++p) {
        const int64_t first = (i % pairs * PAIR + p) * LANES;
        pack(factor.map, channels, channels, first, panel + p, PAIR);
        pack(factor.taps, channels, l.area(), first, taps.data + i * taps_size + p * l.area(), 1);
      }
    }
    Buffer rings(count * ring_size), biases(count * 2 * PAIR);
    std::unique_ptr<const Lanes*[]> under(new (std::nothrow) const Lanes*[size]);
    std::unique_ptr<double[]> wide(new (std::nothrow) double[channels]);
    const bool ready = rings.data && biases.data && under && wide;
    const Scratch scratch{rings.data, biases.data, under.get()};
    failed = !ready;
    if (ready) std::memset(static_cast<void*>(rings.data), 0, count * ring_size * sizeof(Lanes));  // margins stay 0
    for (int64_t stage = 0; stage < stages; ++stage) {
      const bool even = (stages - 1 - stage) % 2 == 0;
      float *to = even ? out : spare, *from = even ? spare : out;
      const auto image_of = [&](int64_t b) {
        const float* input_sum = sums.get() + b * channels;
        const Tokens input{x + b * x_image, x_token}, before{stage ? from + b * image : nullptr, channels};
        return Image{input, before, input_sum, input_sum + batch * channels, to + b * image};
      };
      if (prefix) {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < batch; ++b) {
          if (!ready) continue;  // every thread must come to the loop
          const Image i = image_of(b);
          sum_tokens((stage ? i.before : i.input).from(prefix), l.patches(), channels, wide.get(),
                     sums.get() + ((stage ? batch : 0) + b) * channels);
        }
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < batch * strips * pairs; ++task) {
        if (!ready) continue;
        const int64_t first = task / pairs % strips * strip, last = std::min(first + strip, height);
        go_down(call, stage, image_of(task / (pairs * strips)), task % pairs, first, last, scratch);
      }
    }
  }
  return failed;
}
