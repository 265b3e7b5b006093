#include "bindings/call.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace fastlstm {

Dtype dtype_of(const Array& t) {
  if (t.dtype == aoti_torch_dtype_float32()) return Dtype::f32;
  if (t.dtype == aoti_torch_dtype_float64()) return Dtype::f64;
  if (t.dtype == aoti_torch_dtype_bfloat16()) return Dtype::bf16;
  FASTLSTM_CHECK(t.dtype == aoti_torch_dtype_float16(),
                 "fastlstm: expected a float32, float64, bfloat16 or float16 tensor, got ", dtype_text(t.dtype));
  return Dtype::f16;
}

int32_t compute_type_of(Dtype dtype) {
  return dtype == Dtype::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

Call::Call(const Array& x, Weights w, i64 directions, const Array& batch_sizes, const Array& lengths, i64 gates,
           bool peephole, bool layer_norm)
    : dtype(dtype_of(x)), type(x.dtype), compute_type(compute_type_of(dtype)), packed_rows(bool(batch_sizes)) {
  FASTLSTM_CHECK(directions == 1 || directions == 2, "fastlstm: expected 1 or 2 directions, got ", directions);
  const i64 each = w.count / directions, plain = each - peephole - 4 * layer_norm;
  FASTLSTM_CHECK(plain >= 2 && plain <= 5 && each * directions == w.count, "fastlstm: expected 2 to 5 weights",
                 peephole ? ", 1 of the peepholes" : "", layer_norm ? ", 4 of layer normalisation" : "",
                 " for each of ", directions, " directions, got ", w.count);
  check_input(x);
  sizes.D = directions;
  sizes.peephole = peephole;
  sizes.layer_norm = layer_norm;
  read_sizes(x, w, gates, plain);
  read_rows(x, batch_sizes);
  for (i64 d = 0; d < directions; ++d) read_weights(w.first + d * each, each, plain, weights[d]);
  if (batch_sizes) read_batch_sizes(batch_sizes);
  if (lengths) read_lengths(lengths);
}

Call::Call(const Array& x, const Sizes& layer, const Array& batch_sizes, const Array& lengths)
    : sizes(layer), dtype(dtype_of(x)), type(x.dtype),
      compute_type(dtype == Dtype::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32()),
      packed_rows(bool(batch_sizes)) {
  check_input(x);
  FASTLSTM_CHECK(x.last() == sizes.I, "fastlstm: expected input with a last dimension of ", sizes.I, ", got ",
                 x.shape_text());
  read_rows(x, batch_sizes);
  if (batch_sizes) read_batch_sizes(batch_sizes);
  if (lengths) read_lengths(lengths);
}

void Call::check_input(const Array& x) const {
  FASTLSTM_CHECK(x.dim == 2 || (x.dim == 3 && !packed_rows), "fastlstm: expected ",
                 packed_rows ? "packed rows [N, I]" : "input [T, B, I], or [B, I] for one step", ", got ",
                 x.shape_text());
  FASTLSTM_CHECK(x.last_dense(), "fastlstm: the last dimension of the input must be dense");
}

// Sizes of the layer. plain: how many weights a direction has without those of options.
void Call::read_sizes(const Array& x, Weights w, i64 gates, i64 plain) {
  Sizes& s = sizes;
  s.G = gates;
  s.bias = plain >= 4;
  s.projected = plain % 2 == 1;
  FASTLSTM_CHECK(gates > 1 || !s.projected, "fastlstm: an RNN has no projection");
  s.I = x.last();
  s.H = w[0].dim == 2 ? w[0].sizes[0] / s.G : 0;
  s.P = s.projected ? (w[plain - 1].dim == 2 ? w[plain - 1].sizes[0] : 0) : s.H;
}

// Steps and sequences.
void Call::read_rows(const Array& x, const Array& batch_sizes) {
  Sizes& s = sizes;
  if (packed_rows) {
    rows = x.sizes[0];
    FASTLSTM_CHECK(batch_sizes.dim == 1, "fastlstm: expected batch_sizes [T], got ", batch_sizes.shape_text());
    batch_sizes.check_dtype("batch_sizes", aoti_torch_dtype_int64());
    s.T = batch_sizes.sizes[0];
    s.B = s.T ? static_cast<const i64*>(batch_sizes.data)[0] : 0;
  } else if (x.dim == 2) {  // one step: rows without an offset
    packed_rows = one_step = true;
    rows = s.B = x.sizes[0];
    s.T = 1;
  } else {
    s.T = x.sizes[0];
    s.B = x.sizes[1];
  }
}

// The `each` weights of one direction: w_ih, w_hh, (b_ih, b_hh), (w_hr), (w_ch), (ln_ih, ln_hh, ln_c, b_ln_c).
void Call::read_weights(const Array* w, i64 each, i64 plain, DirectionWeights& of) const {
  const Sizes& s = sizes;
  for (i64 k = 0; k < each; ++k) {
    w[k].check_dtype("a weight", type);
    FASTLSTM_CHECK(w[k].contiguous(), "fastlstm: weights must be contiguous");
  }
  w[0].check_shape("weight_ih", {s.gate_units(), s.I});
  w[1].check_shape("weight_hh", {s.gate_units(), s.P});
  of.w_ih = w[0].data;
  of.w_hh = w[1].data;
  if (s.bias) {
    w[2].check_shape("bias_ih", {s.gate_units()});
    w[3].check_shape("bias_hh", {s.gate_units()});
    of.b_ih = w[2].data;
    of.b_hh = w[3].data;
  }
  if (s.projected) {
    w[plain - 1].check_shape("weight_hr", {s.P, s.H});
    of.w_hr = w[plain - 1].data;
  }
  w += plain;
  if (s.peephole) {
    w->check_shape("weight_ch", {3 * s.H});
    of.w_ch = w++->data;
  }
  if (s.layer_norm) {
    w[0].check_shape("ln_ih", {4 * s.H});
    w[1].check_shape("ln_hh", {4 * s.H});
    w[2].check_shape("ln_c", {s.H});
    w[3].check_shape("bias_ln_c", {s.H});
    of.ln_ih = w[0].data;
    of.ln_hh = w[1].data;
    of.ln_c = w[2].data;
    of.b_ln_c = w[3].data;
  }
}

void Call::read_batch_sizes(const Array& batch_sizes) {
  FASTLSTM_CHECK(batch_sizes.contiguous(), "fastlstm: batch_sizes must be contiguous");
  const i64* n = static_cast<const i64*>(batch_sizes.data);
  row_offset.resize(size_t(sizes.T));
  length.resize(size_t(sizes.B));
  i64 total = 0;
  for (i64 t = 0; t < sizes.T; ++t) {
    FASTLSTM_CHECK(n[t] > 0 && (t == 0 || n[t] <= n[t - 1]),
                   "fastlstm: batch_sizes must be positive and never increase");
    row_offset[size_t(t)] = total;
    total += n[t];
  }
  FASTLSTM_CHECK(total == rows, "fastlstm: batch_sizes add up to ", total, " rows, the input has ", rows);
  i64 t = sizes.T;
  for (i64 slot = 0; slot < sizes.B; ++slot) {
    while (n[t - 1] <= slot) --t;
    length[size_t(slot)] = t;
  }
  ragged = {row_offset.data(), n, nullptr, length.data()};
}

void Call::read_lengths(const Array& lengths) {
  FASTLSTM_CHECK(!packed_rows, "fastlstm: packed rows have their lengths in batch_sizes");
  lengths.check_dtype("lengths", aoti_torch_dtype_int64());
  lengths.check_shape("lengths", {sizes.B});
  FASTLSTM_CHECK(lengths.contiguous(), "fastlstm: lengths must be contiguous");
  const i64* n = static_cast<const i64*>(lengths.data);
  order.resize(size_t(sizes.B));
  std::iota(order.begin(), order.end(), i64(0));
  std::stable_sort(order.begin(), order.end(), [&](i64 a, i64 b) { return n[a] > n[b]; });
  active.assign(size_t(sizes.T), 0);
  for (i64 b : order) {
    FASTLSTM_CHECK(n[b] >= 0 && n[b] <= sizes.T, "fastlstm: expected lengths between 0 and ", sizes.T, ", got ", n[b]);
    length.push_back(n[b]);
  }
  i64 slot = sizes.B;
  for (i64 t = 0; t < sizes.T; ++t) {
    while (slot > 0 && length[size_t(slot - 1)] <= t) --slot;
    active[size_t(t)] = slot;
  }
  ragged = {nullptr, active.data(), order.data(), length.data()};
}

Rows Call::rows_of(const Array& t, const char* name, i64 n, int32_t expected) const {
  Rows result = shared_rows_of(t, name, sizes.D * n, expected);
  result.direction = n;
  return result;
}

Rows Call::shared_rows_of(const Array& t, const char* name, i64 n, int32_t expected) const {
  if (!t) return {};
  t.check_dtype(name, expected);
  packed_rows ? t.check_shape(name, {rows, n}) : t.check_shape(name, {sizes.T, sizes.B, n});
  FASTLSTM_CHECK(t.last_dense(), "fastlstm: the last dimension of ", name, " must be dense");
  return {t.data, 0, packed_rows ? 0 : t.strides[0], t.strides[packed_rows ? 0 : 1]};
}

Rows Call::gates_of(const Array& t) const {
  if (!t) return {};
  const i64 n = 4 * sizes.H;
  t.check_dtype("gates", compute_type);
  packed_rows ? t.check_shape("gates", {sizes.D, rows, n}) : t.check_shape("gates", {sizes.D, sizes.T, sizes.B, n});
  FASTLSTM_CHECK(t.contiguous(), "fastlstm: gates must be contiguous");
  return {t.data, (packed_rows ? rows : sizes.T * sizes.B) * n, sizes.B * n, n};
}

States Call::states_of(const Array& t, const char* name, i64 n, int32_t expected) const {
  if (!t) return {};
  t.check_dtype(name, expected);
  one_step ? t.check_shape(name, {sizes.B, n}) : t.check_shape(name, {sizes.D, sizes.B, n});
  FASTLSTM_CHECK(t.last_dense(), "fastlstm: the last dimension of ", name, " must be dense");
  return {t.data, one_step ? 0 : t.strides[0], t.strides[one_step ? 0 : 1]};
}

CellOptions Call::cell_of(const Array& h_mask, double zoneout_c, double zoneout_h, const Array& seed) const {
  FASTLSTM_CHECK(zoneout_c >= 0 && zoneout_c < 1 && zoneout_h >= 0 && zoneout_h < 1,
                 "fastlstm: expected probabilities of zoneout in [0, 1), got ", zoneout_c, " and ", zoneout_h);
  CellOptions cell{};
  cell.h_mask = states_of(h_mask, "h_mask", sizes.P, compute_type);
  cell.zoneout_c = zoneout_c;
  cell.zoneout_h = zoneout_h;
  if (seed) {
    seed.check_dtype("seed", aoti_torch_dtype_int64());
    seed.check_shape("seed", {1});
    cell.random = true;
    std::memcpy(&cell.seed, seed.data, sizeof cell.seed);
  }
  return cell;
}

}  // namespace fastlstm
