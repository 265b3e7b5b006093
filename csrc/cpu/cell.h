// What regularised cells have beyond the plain LSTM: peepholes, layer normalisation and zoneout.
//
// A step of theirs goes by rows: gate sums of all units first, in tile order without padding, then everything else.
#pragma once

#include "activations.h"
#include "pack.h"

namespace fastlstm {
namespace {

enum class Cell { lstm, regularised, rnn };

constexpr i64 kRowGroup = 16;  // rows that go through each stage of a cell together, so that none waits for one row

// ---- zoneout ------------------------------------------------------------------------------------------------

// The hash behind its random numbers, of 32-bit words; lanes may be wider than a word.
template <class Word>
FASTLSTM_INLINE Word mix(Word x) {
  x = ((x ^ (x >> 16)) * 0x21f0aaadu) & 0xffffffffu;
  x = ((x ^ (x >> 15)) * 0x735a2d97u) & 0xffffffffu;
  return x ^ (x >> 15);
}

// Zoneout of h (kind 0) or c (kind 1) of one direction.
template <class S>
class Zoneout {
 public:
  using Words = typename Simd<S>::Words;
  using Word = typename Simd<S>::Word;

  Zoneout() = default;
  Zoneout(double probability, bool random, uint32_t base, int kind, i64 units)
      : active_(probability > 0), random_(random), stays_(S(probability)), changes_(S(1 - probability)),
        threshold_(uint32_t(probability * 0x1p32)) {
    if (!active_ || !random_) return;
    keys_ = Buffer<Word>(round_up(units, kLanes<S>));
    for (i64 u = 0; u < round_up(units, kLanes<S>); ++u) keys_[u] = mix(uint32_t(base + 2 * u + kind));
  }

  explicit operator bool() const { return active_; }

  // The state of kLanes units after a step.
  FASTLSTM_INLINE Vec<S> state(Vec<S> before, Vec<S> after, uint32_t row_key, i64 unit) const {
    return random_ ? (stay(row_key, unit) ? before : after) : fma(splat(changes_), after, stays_ * before);
  }
  // Its gradient d, divided between the states before and after.
  FASTLSTM_INLINE void divide(Vec<S> d, uint32_t row_key, i64 unit, Vec<S>& before, Vec<S>& after) const {
    if (random_) {
      const auto stays = stay(row_key, unit);
      before = stays ? d : Vec<S>{};
      after = stays ? Vec<S>{} : d;
    } else {
      before = stays_ * d;
      after = changes_ * d;
    }
  }

 private:
  FASTLSTM_INLINE typename Simd<S>::Int stay(uint32_t row_key, i64 unit) const {
    Words key;
    std::memcpy(&key, &keys_[unit], sizeof key);
    return mix(key ^ Word(row_key)) < Word(threshold_);
  }

  bool active_ = false, random_ = false;
  S stays_ = 0, changes_ = 1;
  uint32_t threshold_ = 0;
  Buffer<Word> keys_;
};

// ---- layer normalisation ------------------------------------------------------------------------------------

template <class S>
FASTLSTM_INLINE S horizontal_sum(Vec<S> v) {
#pragma GCC unroll 4
  for (int half = kLanes<S> / 2; half; half /= 2) {
    Vec<S> other = {};
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<S>; ++k) other[k] = v[k ^ half];
    v += other;
  }
  return v[0];
}

// sums[j] = sum over n elements of terms[j] from f(first, lanes, terms); lanes beyond the last element do not count.
template <class S, int N, class F>
FASTLSTM_INLINE void sum_vectors(i64 n, S (&sums)[N], const F& f) {
  Vec<S> even[N] = {}, odd[N] = {}, terms[N];  // two chains: additions wait for each other
  i64 k = 0;
  for (; k + 2 * kLanes<S> <= n; k += 2 * kLanes<S>) {
    f(k, i64(kLanes<S>), terms);
    for (int j = 0; j < N; ++j) even[j] += terms[j];
    f(k + kLanes<S>, i64(kLanes<S>), terms);
    for (int j = 0; j < N; ++j) odd[j] += terms[j];
  }
  for_vectors<S>(n - k, [&](i64 first, i64 lanes) FASTLSTM_INLINE_LAMBDA {
    f(k + first, lanes, terms);
    for (int j = 0; j < N; ++j) {
      Vec<S> counted = {};
      std::memcpy(&counted, &terms[j], size_t(lanes) * sizeof(S));
      even[j] += counted;
    }
  });
  for (int j = 0; j < N; ++j) sums[j] = horizontal_sum<S>(even[j] + odd[j]);
}

// Of a group of rows of n elements. What is one number a row is computed for all rows at once.
template <class S>
struct Moments {
  alignas(64) S mean[kRowGroup], scale[kRowGroup];  // scale = 1 / sqrt(variance + epsilon)

  template <class Row>
  FASTLSTM_INLINE Moments(i64 rows, i64 n, const Row& row) {
    S sums[kRowGroup][1] = {};
#pragma GCC unroll 1
    for (i64 i = 0; i < rows; ++i) {
      const S* a = row(i);
      sum_vectors<S>(n, sums[i], [&](i64 k, i64 lanes, Vec<S>(&term)[1]) FASTLSTM_INLINE_LAMBDA {
        term[0] = load_n(a + k, lanes);
      });
    }
    for (i64 i = 0; i < kRowGroup; ++i) mean[i] = sums[i][0] / S(n);
#pragma GCC unroll 1
    for (i64 i = 0; i < rows; ++i) {
      const S* a = row(i);
      sum_vectors<S>(n, sums[i], [&](i64 k, i64 lanes, Vec<S>(&term)[1]) FASTLSTM_INLINE_LAMBDA {
        const Vec<S> distance = load_n(a + k, lanes) - mean[i];
        term[0] = distance * distance;
      });
    }
    for (i64 i = 0; i < kRowGroup; ++i) scale[i] = S(1) / std::sqrt(sums[i][0] / S(n) + S(1e-5));
  }
  // Element v of row i.
  FASTLSTM_INLINE Vec<S> normalise(i64 i, Vec<S> v) const { return (v - mean[i]) * scale[i]; }
};

// Gradient of values that were normalised, from d, that of `normal` * gain: mean and slope are the means of d * gain
// and of d * gain * normal over the row.
template <class S>
FASTLSTM_INLINE Vec<S> normalise_grad(Vec<S> d, Vec<S> gain, Vec<S> normal, S scale, S mean, S slope) {
  return (d * gain - mean - normal * slope) * scale;
}

// ---- a direction of a regularised cell ----------------------------------------------------------------------

// Read by all threads of a call.
template <class S>
struct Regularised {
  const Sizes& s;
  const i64 pitch_;        // of hidden units
  Buffer<S> w_ch;          // [3][pitch], of i, f, o; or absent
  Buffer<S> bias;          // [4H] in tile order; only with layer normalisation, as what follows
  Buffer<S> ln_ih, ln_hh;  // [4H] in tile order
  Buffer<S> ln_c, b_ln_c;  // [H]
  Zoneout<S> zone_h, zone_c;
  uint32_t row_base = 0;

  Regularised(const Sizes& s, Dtype dtype, const CellOptions& cell, const DirectionWeights& w, i64 direction)
      : s(s), pitch_(pitch<S>(s.H)) {
    if (s.peephole) {
      w_ch = Buffer<S>(3 * pitch_);
      w_ch.zero();
      for (i64 k = 0; k < 3; ++k) convert_in(&w_ch[k * pitch_], w.w_ch, dtype, k * s.H, s.H);
    }
    if (s.layer_norm) {
      const AsCompute<S> b_ih(w.b_ih, dtype, 4 * s.H), b_hh(w.b_hh, dtype, 4 * s.H);
      const AsCompute<S> of_ih(w.ln_ih, dtype, 4 * s.H), of_hh(w.ln_hh, dtype, 4 * s.H);
      bias = Buffer<S>(4 * s.H);
      ln_ih = Buffer<S>(4 * s.H);
      ln_hh = Buffer<S>(4 * s.H);
      for (i64 q = 0; q < 4 * s.H; ++q) {
        const i64 row = gate_row<S>(s, q);
        bias[q] = s.bias ? b_ih.get()[row] + b_hh.get()[row] : S(0);
        ln_ih[q] = of_ih.get()[row];
        ln_hh[q] = of_hh.get()[row];
      }
      ln_c = Buffer<S>(s.H);
      b_ln_c = Buffer<S>(s.H);
      convert_in(ln_c.get(), w.ln_c, dtype, 0, s.H);
      convert_in(b_ln_c.get(), w.b_ln_c, dtype, 0, s.H);
    }
    const uint32_t base = mix(mix(uint32_t(cell.seed) + uint32_t(direction)) + uint32_t(cell.seed >> 32));
    row_base = base ^ 0x9e3779b9u;
    zone_h = Zoneout<S>(cell.zoneout_h, cell.random, base, 0, s.P);
    zone_c = Zoneout<S>(cell.zoneout_c, cell.random, base, 1, s.H);
  }

  // Of the sequence b at time t, for both kinds of zoneout.
  uint32_t row_key(i64 t, i64 b) const { return mix(mix(row_base + uint32_t(t)) + uint32_t(b)); }

  // Gates of a row. sum(k, n): the n gate sums from k on in tile order. c_previous: null for zero. cell: where the new
  // c goes, before zoneout; padded to whole vectors, or null.
  template <class Sum>
  FASTLSTM_INLINE void activate_row(const Sum& sum, S* gates, const S* c_previous, S* cell) const {
    for_vectors<S>(s.H, [&](i64 unit, i64 n) FASTLSTM_INLINE_LAMBDA {
      const i64 k = 4 * unit;
      const Vec<S> c = c_previous ? load_n(c_previous + unit, n) : Vec<S>{};
      Vec<S> i = sum(k, n), f = sum(k + n, n), g = sum(k + 2 * n, n), o = sum(k + 3 * n, n);
      if (w_ch) {
        i = fma(load(&w_ch[unit]), c, i);
        f = fma(load(&w_ch[pitch_ + unit]), c, f);
      }
      i = sigmoid(i);
      f = sigmoid(f);
      g = tanh(g);
      const Vec<S> c_new = fma(f, c, i * g);
      if (w_ch) o = fma(load(&w_ch[2 * pitch_ + unit]), c_new, o);
      store_n(gates + k, i, n);
      store_n(gates + k + n, f, n);
      store_n(gates + k + 2 * n, g, n);
      store_n(gates + k + 3 * n, sigmoid(o), n);
      if (cell) store(cell + unit, c_new);
    });
  }

  // The same from x w_ih^T and h w_hh^T, row i of their group. With `keep` their normalised values replace them.
  template <bool keep>
  FASTLSTM_INLINE void activate_normalised(S* x, const Moments<S>& of_x, S* h, const Moments<S>& of_h, i64 i, S* gates,
                                           const S* c_previous, S* cell) const {
    const auto sum = [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
      const Vec<S> normal_x = of_x.normalise(i, load_n(x + k, n)), normal_h = of_h.normalise(i, load_n(h + k, n));
      if (keep) {
        store_n(x + k, normal_x, n);
        store_n(h + k, normal_h, n);
      }
      return fma(normal_h, load_n(&ln_hh[k], n), fma(normal_x, load_n(&ln_ih[k], n), load_n(&bias[k], n)));
    };
    activate_row(sum, gates, c_previous, cell);
  }
};

// Those of a call: one for each direction of a regularised cell, none of any other.
template <class S>
class RegularisedDirections {
 public:
  RegularisedDirections(bool any, const Sizes& s, Dtype dtype, const CellOptions& cell, const DirectionWeights* w) {
    if (any)
      for (i64 d = 0; d < s.D; ++d) each_[d] = new Regularised<S>(s, dtype, cell, w[d], d);
  }
  RegularisedDirections(const RegularisedDirections&) = delete;
  ~RegularisedDirections() {
    for (const Regularised<S>* one : each_) delete one;
  }
  const Regularised<S>* operator[](i64 d) const { return each_[d]; }

 private:
  const Regularised<S>* each_[2] = {};
};

}  // namespace
}  // namespace fastlstm
