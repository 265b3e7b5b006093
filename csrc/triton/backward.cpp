#include "triton/operators.h"

namespace fastlstm::ahead {
namespace {

// A backward pass, as fastlstm/kernels/triton/backward_by_unit.py.
struct Backward {
  Place place;
  i64 I, H, D;
  std::vector<Weights> weights, copies;  // now; in the forward pass, if these are others
  Rows rows;
  Array x;               // [rows, I]; zero in padding where that could reach a sum
  std::vector<Array> h;  // of each direction [rows, H], before each step; or nothing

  const std::vector<Weights>& then() const { return copies.empty() ? weights : copies; }
  Array part(const Array& t, i64 d) const { return view(t, {rows.count, 4 * H}, {4 * H, 1}, d * rows.count * 4 * H); }

  void find_states(const Array& y, const Array& h0) {
    const Array states = flat_rows(y, place);
    for (i64 d = 0; d < D; ++d) {
      const Array start = h0 ? view(h0, {rows.B, H}, {H, 1}, d * rows.B * H) : Array();
      h.push_back(rows.states_before(columns(states, d * H, H), start, d, place));
    }
  }
  // Whatever x holds in padding must not meet the zeros of dgates.
  void clear_padding() {
    Array clean = place.empty({rows.count, I}, x.dtype);
    copy(clean, x);
    zero_where(clean, ended(rows.lengths, rows.T, rows.B, place));
    x = std::move(clean);
  }
  // The gates of all steps before activation, without biases: float32 [D, rows, H, 4].
  Array gates_again() const {
    Array found = place.empty({D, rows.count, 4 * H}, aoti_torch_dtype_float32());
    for (i64 d = 0; d < D; ++d) {
      const Weights& each = then()[size_t(d)];
      product_into(part(found, d), x, transposed(by_unit(each.w_ih, place)), place);
      add(part(found, d), product(h[size_t(d)], transposed(by_unit(each.w_hh, place)), place));
    }
    return found;
  }
  void write_dx(const Array& dx, const Array& dgates) const {
    if (!dx) return;
    FASTLSTM_CHECK(dx.contiguous(), "fastlstm: dx must be contiguous");
    const Array out = flat_rows(dx, place);
    if (D == 1) return product_into(out, part(dgates, 0), by_unit(weights[0].w_ih, place), place);
    const Array sum = product(part(dgates, 0), by_unit(weights[0].w_ih, place), place);
    add(sum, product(part(dgates, 1), by_unit(weights[1].w_ih, place), place));
    copy(out, sum);
  }
  // dweights: of each direction those of w_ih, w_hh and, where there are biases, both of them.
  void write_dweights(const std::vector<Array>& dweights, const Array& dgates) const {
    if (dweights.empty()) return;
    const size_t each = dweights.size() / size_t(D);
    FASTLSTM_CHECK(each == (weights[0].b_ih ? 3 : 2), "fastlstm: not the gradients of these weights");
    for (i64 d = 0; d < D; ++d) {
      const Array *target = &dweights[size_t(d) * each], own = part(dgates, d);
      copy_by_gate(target[0], product(transposed(own), x, place));
      copy_by_gate(target[1], product(transposed(own), h[size_t(d)], place));
      if (each < 3) continue;
      Array sum = place.empty({4 * H}, dgates.dtype);
      sum_rows(sum, own);
      copy_by_gate(target[2], sum);
    }
  }
};

}  // namespace

void lstm_bwd_triton(Handle x_, const HandleList& weights_, i64 directions, OptionalHandle h0_, OptionalHandle c0_,
                     OptionalHandle batch_sizes_, OptionalHandle lengths_, OptionalHandle reset_, Handle y_,
                     Handle c_all_, OptionalHandle gates_, OptionalHandle dy_, OptionalHandle dh_n_,
                     OptionalHandle dc_n_, OptionalHandle dc_all_, OptionalHandle dx_, OptionalHandle dh0_,
                     OptionalHandle dc0_, const HandleList& dweights_, OptionalHandle cache_, bool peephole,
                     bool layer_norm, OptionalHandle h_mask_, double zoneout_c, double zoneout_h,
                     OptionalHandle seed_) {
  const bool more = peephole || layer_norm || h_mask_ || zoneout_c != 0 || zoneout_h != 0;
  std::vector<Array> flat = to_arrays(weights_), dweights = to_arrays(dweights_);
  Array x(x_), given_h0(h0_), given_c0(c0_), batch_sizes(batch_sizes_), lengths(lengths_), reset(reset_), y(y_),
      c_all(c_all_), kept(gates_), dy(dy_), given_dh_n(dh_n_), given_dc_n(dc_n_), dc_all(dc_all_), dx(dx_), dh0(dh0_),
      dc0(dc0_), cache(cache_), h_mask(h_mask_), seed(seed_);
  const bool dense_rows = !batch_sizes && !lengths && !reset;
  const Question asked(x, flat.data(), flat.size(), directions, true, dense_rows, more);
  if (!asked.row)
    return instead("fastlstm::lstm_bwd_triton_jit", given(x), given(flat), directions, given_or_none(given_h0),
                   given_or_none(given_c0), given_or_none(batch_sizes), given_or_none(lengths), given_or_none(reset),
                   given(y), given(c_all), given_or_none(kept), given_or_none(dy), given_or_none(given_dh_n),
                   given_or_none(given_dc_n), given_or_none(dc_all), given_or_none(dx), given_or_none(dh0),
                   given_or_none(dc0), given(dweights), given_or_none(cache), peephole, layer_norm,
                   given_or_none(h_mask), zoneout_c, zoneout_h, given_or_none(seed));
  const Place place = Place::of(x.handle());
  const NoGrad no_grad;
  std::vector<Weights> weights = Weights::split(flat.data(), flat.size(), directions, x.dtype, place);
  Rows rows(x, batch_sizes, std::move(lengths), std::move(reset), place);
  const Array h0 = dense(std::move(given_h0), place), c0 = dense(std::move(given_c0), place),
              dh_n = dense(std::move(given_dh_n), place), dc_n = dense(std::move(given_dc_n), place);
  if (rows.count == 0) {
    for (const Array* t : std::initializer_list<const Array*>{&dx, &dh0, &dc0}) zero(*t);
    for (const Array& t : dweights) zero(t);
    return;
  }
  Backward pass{place, asked.I, asked.H, directions, std::move(weights), {}, std::move(rows), flat_rows(x, place), {}};
  // Whether each of them is a product of its own.
  const bool apart = !dweights.empty() && !takes_weights(asked, pass.rows, directions);
  if (pass.rows.padded() && apart) pass.clear_padding();
  if (!kept || apart) pass.find_states(y, h0);
  if (!kept && cache) pass.copies = Weights::of_copies(cache, pass.weights);
  const i64 H = asked.H, states = directions * pass.rows.B * H, cells = directions * pass.rows.count * H;
  const int32_t f32 = aoti_torch_dtype_float32();
  check(c_all, "c_all", f32, cells);
  check(kept, "gates", x.dtype, 4 * cells, kAligned);
  for (const Array* t : std::initializer_list<const Array*>{&dh_n, &dc_n, &dh0, &dc0, &c0, &h0})
    check(*t, "a state", x.dtype, states);
  for (const Array* t : std::initializer_list<const Array*>{&dy, &dc_all}) check_strided(*t, x.dtype, directions * H);
  const Array again = kept ? Array() : pass.gates_again();
  const Array dgates = pass.rows.padded() ? place.zeros({directions, pass.rows.count, 4 * H}, x.dtype)
                                          : place.empty({directions, pass.rows.count, 4 * H}, x.dtype);
  const bool even = even_weights(pass.weights, H) && aligned(c_all, kAligned) && even_gradient(dy);
  Kernel* kernel = asked.device->find({asked.row, pass.rows.kind(bool(dc_all)), bool(kept), even, false});
  FASTLSTM_CHECK(kernel, "fastlstm: no kernel for this call was compiled ahead");
  Arguments a;
  a.set(k_gates, kept ? kept : again);
  set_rows(&a, pass.rows, H, directions);
  set_weights(&a, pass.weights, false);
  set_biases(&a, pass.then());
  a.set(k_c0, c0);
  a.set(k_c_all, c_all);
  a.set(k_dy, dy);
  a.set(k_dc_all, dc_all);
  a.set(k_dh_n, dh_n);
  a.set(k_dc_n, dc_n);
  a.set(k_dgates, dgates);
  a.set(k_dh0, dh0);
  a.set(k_dc0, dc0);
  set_strides(&a, k_dy_t, k_dy_b, dy);
  set_strides(&a, k_dc_t, k_dc_b, dc_all);
  asked.device->launch(kernel, &a, (pass.rows.B + kernel->batch - 1) / kernel->batch, directions);
  pass.write_dx(dx, dgates);
  if (apart || dweights.empty())
    pass.write_dweights(dweights, dgates);
  else
    launch_weight_gradients(asked, pass.rows, pass.x, flat_rows(y, place), h0, dgates, dweights);
}

}  // namespace fastlstm::ahead
