#include "triton/operators.h"

namespace fastlstm::ahead {
namespace {

// What a forward pass writes.
struct Outputs {
  const Array &y, &h_n, &c_n, &c_all, &gates;
};

void forward(const Question& asked, const Place& place, const Array& x, const std::vector<Weights>& weights,
             const Rows& rows, const Array& h0, const Array& c0, const Outputs& out) {
  const i64 H = asked.H, D = i64(weights.size()), states = D * rows.B * H, cells = D * rows.count * H;
  for (const Array* t : {&out.h_n, &out.c_n, &h0, &c0}) check(*t, "a state", x.dtype, states);
  check(out.y, "y", x.dtype, cells);
  check(out.c_all, "c_all", aoti_torch_dtype_float32(), cells);
  check(out.gates, "gates", x.dtype, 4 * cells, kAligned);
  FASTLSTM_CHECK(x.last_dense(), "fastlstm: the last dimension of the input must be dense");
  if (rows.padded()) {
    zero(out.y);
    zero(out.c_all);
  }
  const bool even = even_weights(weights, H) && aligned(out.y, kAligned) && aligned(out.c_all, kAligned);
  Kernel* kernel = asked.device->find({asked.row, rows.kind(false), out.c_all || out.gates, even, even_input(x)});
  FASTLSTM_CHECK(kernel, "fastlstm: no kernel for this call was compiled ahead");
  const bool fused = kernel->fused;
  const Array products = fused ? Array() : input_products(asked, x, weights, rows, place);
  Arguments a;
  a.set(k_x, fused ? x : products);
  set_rows(&a, rows, H, D);
  set_weights(&a, weights, fused);
  set_biases(&a, weights);
  a.set(k_h0, h0);
  a.set(k_c0, c0);
  a.set(k_y, out.y);
  a.set(k_h_n, out.h_n);
  a.set(k_c_n, out.c_n);
  a.set(k_c_all, out.c_all);
  a.set(k_gates, out.gates);
  a.set(k_I, asked.I, "inputs");
  set_strides(&a, k_x_t, k_x_b, x);
  asked.device->launch(kernel, &a, (rows.B + kernel->batch - 1) / kernel->batch, D);
}

// The states [count, B, H] of some rows of [layers * D, B, H]; absent if these are.
Array states_of(const Array& t, i64 first, i64 count) {
  if (!t) return Array();
  const i64 B = t.sizes[1], H = t.sizes[2];
  return view(t, {count, B, H}, {B * H, H, 1}, first * B * H);
}

// The pass of a call that was compiled ahead.
void run(const Question& asked, const Array& x, std::vector<Array>& flat, i64 directions, Array h0, Array c0,
         const Array& batch_sizes, Array lengths, Array reset, const Outputs& out) {
  const Place place = Place::of(x.handle());
  const NoGrad no_grad;
  const std::vector<Weights> weights = Weights::split(flat.data(), flat.size(), directions, x.dtype, place);
  const Rows rows(x, batch_sizes, std::move(lengths), std::move(reset), place);
  if (rows.count == 0) return;
  forward(asked, place, x, weights, rows, dense(std::move(h0), place), dense(std::move(c0), place), out);
}

constexpr const char* kForwardJit = "fastlstm::lstm_fwd_triton_jit";

}  // namespace

void lstm_fwd_triton(Handle x_, const HandleList& weights_, i64 directions, OptionalHandle h0_, OptionalHandle c0_,
                     OptionalHandle batch_sizes_, OptionalHandle lengths_, OptionalHandle reset_, Handle y_,
                     Handle h_n_, Handle c_n_, OptionalHandle c_all_, OptionalHandle gates_, OptionalHandle cache_,
                     bool peephole, bool layer_norm, OptionalHandle h_mask_, double zoneout_c, double zoneout_h,
                     OptionalHandle seed_) {
  const bool more = peephole || layer_norm || h_mask_ || zoneout_c != 0 || zoneout_h != 0;
  std::vector<Array> flat = to_arrays(weights_);
  Array x(x_), h0(h0_), c0(c0_), batch_sizes(batch_sizes_), lengths(lengths_), reset(reset_), y(y_), h_n(h_n_),
      c_n(c_n_), c_all(c_all_), gates(gates_), cache(cache_), h_mask(h_mask_), seed(seed_);
  const Question asked(x, flat.data(), flat.size(), directions, false, batch_sizes, more);
  if (!asked.row)
    return instead(kForwardJit, given(x), given(flat), directions, given_or_none(h0), given_or_none(c0),
                   given_or_none(batch_sizes), given_or_none(lengths), given_or_none(reset), given(y), given(h_n),
                   given(c_n), given_or_none(c_all), given_or_none(gates), given_or_none(cache), peephole, layer_norm,
                   given_or_none(h_mask), zoneout_c, zoneout_h, given_or_none(seed));
  run(asked, x, flat, directions, std::move(h0), std::move(c0), batch_sizes, std::move(lengths), std::move(reset),
      {y, h_n, c_n, c_all, gates});
}

std::tuple<Output, Output, Output, Output, Output> lstm_plain_fwd_triton(Handle x_, const HandleList& weights_,
                                                                         i64 directions, OptionalHandle h0_,
                                                                         OptionalHandle c0_, bool tf32) {
  std::vector<Array> flat = to_arrays(weights_);
  Array x(x_), h0(h0_), c0(c0_);
  const Question asked(x, flat.data(), flat.size(), directions, false, Array(), false, tf32);
  FASTLSTM_CHECK(x.dim == 3, "fastlstm: expected input [T, B, I], got ", x.shape_text());
  FASTLSTM_CHECK(flat.size() > 1 && flat[1].dim == 2, "fastlstm: expected the weights of a layer");
  const Place place = Place::of(x.handle());
  if (!x.last_dense()) x = dense(std::move(x), place);
  const i64 T = x.sizes[0], B = x.sizes[1], H = flat[1].last(), D = directions;
  Array y = place.empty({T, B, D * H}, x.dtype), h_n = place.empty({D, B, H}, x.dtype),
        c_n = place.empty({D, B, H}, x.dtype), c_all = place.empty({T, B, D * H}, aoti_torch_dtype_float32()),
        gates = place.empty({D, T, B, 4 * H}, x.dtype);
  if (asked.row)
    run(asked, x, flat, D, std::move(h0), std::move(c0), Array(), Array(), Array(), {y, h_n, c_n, c_all, gates});
  else
    instead(kForwardJit, given(x), given(flat), D, given_or_none(h0), given_or_none(c0), kAbsent, kAbsent, kAbsent,
            shared(y), shared(h_n), shared(c_n), OptionalHandle(shared(c_all)), OptionalHandle(shared(gates)), kAbsent,
            false, false, kAbsent, 0.0, 0.0, kAbsent);
  return {y.release(), h_n.release(), c_n.release(), c_all.release(), gates.release()};
}

std::tuple<Output, Output, Output> lstm_infer_triton(Handle x_, const HandleList& weights_, i64 layers, i64 directions,
                                                     OptionalHandle h0_, OptionalHandle c0_, const HandleList& caches_,
                                                     bool tf32) {
  std::vector<Array> flat = to_arrays(weights_);
  const std::vector<Array> unused = to_arrays(caches_);
  Array x(x_), given_h0(h0_), given_c0(c0_);
  const Array none;
  const Place place = Place::of(x.handle());
  const size_t each = layers > 0 ? flat.size() / size_t(layers) : 0;
  FASTLSTM_CHECK(layers > 0 && each * size_t(layers) == flat.size(), "fastlstm: expected weights of ", layers,
                 " layers, got ", flat.size());
  FASTLSTM_CHECK(x.dim == 3 && x.sizes[0] > 0 && x.sizes[1] > 0, "fastlstm: expected input [T, B, I], got ",
                 x.shape_text());
  const NoGrad no_grad;
  const i64 T = x.sizes[0], B = x.sizes[1], D = directions;
  const Array h0 = dense(std::move(given_h0), place), c0 = dense(std::move(given_c0), place);
  check_place(h0, "h0", place);
  check_place(c0, "c0", place);
  Array h_n, c_n, before;
  for (i64 k = 0; k < layers; ++k) {
    const Array& input = k ? before : x;
    Array* own = flat.data() + size_t(k) * each;
    const Question asked(input, own, each, D, false, none, false, tf32);
    FASTLSTM_CHECK(asked.row, "fastlstm: the layer was not compiled ahead");
    const i64 H = asked.H;
    if (!k) {
      h_n = place.empty({layers * D, B, H}, x.dtype);
      c_n = place.empty({layers * D, B, H}, x.dtype);
      if (h0) h0.check_shape("h0", {layers * D, B, H});
      if (c0) c0.check_shape("c0", {layers * D, B, H});
    }
    Array y = place.empty({T, B, D * H}, x.dtype);
    const std::vector<Weights> weights = Weights::split(own, each, D, x.dtype, place);
    forward(asked, place, input, weights, Rows(input, none, Array(), Array(), place), states_of(h0, k * D, D),
            states_of(c0, k * D, D), {y, states_of(h_n, k * D, D), states_of(c_n, k * D, D), none, none});
    before = std::move(y);
  }
  return {before.release(), h_n.release(), c_n.release()};
}

}  // namespace fastlstm::ahead
