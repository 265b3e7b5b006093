#include "triton/operators.h"

namespace fastlstm::ahead {
namespace {

// A backward pass, as fastlstm/kernels/triton/backward_by_unit.py.
struct Backward {
  Place place;
  i64 I, H, D;
  std::vector<Weights> weights, copies;  // now; in the forward pass, if these are others
  Rows rows;
  Array x;               // [rows, I], for products; zero in padding where that could reach a sum
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
  // dweights: of each direction those of w_ih, w_hh and, where there are biases, one for both of them or two.
  void write_dweights(const std::vector<Array>& dweights, const Array& dgates) const {
    const size_t each = dweights.size() / size_t(D);
    for (i64 d = 0; d < D; ++d) {
      const Array *target = &dweights[size_t(d) * each], own = part(dgates, d);
      copy_by_gate(target[0], product(transposed(own), x, place));
      copy_by_gate(target[1], product(transposed(own), h[size_t(d)], place));
      if (each < 3) continue;
      Array sum = place.empty({4 * H}, dgates.dtype);
      sum_rows(sum, own);
      for (size_t k = 2; k < each; ++k) copy_by_gate(target[k], sum);
    }
  }
};

// The tensors of a call, in the order of the operator.
struct Given {
  Array x;
  std::vector<Array> weights;
  Array h0{}, c0{}, batch_sizes{}, lengths{}, reset{}, y{}, c_all{}, gates{};
  Array dy{}, dh_n{}, dc_n{}, dc_all{}, dx{}, dh0{}, dc0{};
  std::vector<Array> dweights{};
  Array cache{};
};

// The pass of a call that was compiled ahead.
void run(const Question& asked, Given& t, i64 D) {
  const Place place = Place::of(t.x.handle());
  const NoGrad no_grad;
  std::vector<Weights> weights = Weights::split(t.weights.data(), t.weights.size(), D, t.x.dtype, place);
  Rows rows(t.x, t.batch_sizes, std::move(t.lengths), std::move(t.reset), place);
  const Array h0 = dense(std::move(t.h0), place), c0 = dense(std::move(t.c0), place),
              dh_n = dense(std::move(t.dh_n), place), dc_n = dense(std::move(t.dc_n), place);
  if (rows.count == 0) {
    for (const Array* each : std::initializer_list<const Array*>{&t.dx, &t.dh0, &t.dc0}) zero(*each);
    for (const Array& each : t.dweights) zero(each);
    return;
  }
  const size_t each = t.dweights.size() / size_t(D), biases = weights[0].b_ih ? 1 : 0;
  FASTLSTM_CHECK(!each || each == 2 + biases || each == 2 + 2 * biases, "fastlstm: not the gradients of these weights");
  Backward pass{place, asked.I, asked.H, D, std::move(weights), {}, std::move(rows), {}, {}};
  const bool kept = bool(t.gates);
  // Whether each of the gradients of weights is a product of its own.
  const bool apart = each && !takes_weights(asked, pass.rows, D);
  if (!kept || apart) pass.x = flat_rows(t.x, place);
  if (pass.rows.padded() && apart) pass.clear_padding();
  if (!kept || apart) pass.find_states(t.y, h0);
  if (!kept && t.cache) pass.copies = Weights::of_copies(t.cache, pass.weights);
  const i64 H = asked.H, states = D * pass.rows.B * H, cells = D * pass.rows.count * H;
  check(t.c_all, "c_all", aoti_torch_dtype_float32(), cells);
  check(t.gates, "gates", t.x.dtype, 4 * cells, kAligned);
  for (const Array* state : std::initializer_list<const Array*>{&dh_n, &dc_n, &t.dh0, &t.dc0, &c0, &h0})
    check(*state, "a state", t.x.dtype, states);
  for (const Array* grad : std::initializer_list<const Array*>{&t.dy, &t.dc_all})
    check_strided(*grad, t.x.dtype, D * H);
  const Array again = kept ? Array() : pass.gates_again();
  const Sizes_ size{D, pass.rows.count, 4 * H};
  const Array dgates = pass.rows.padded() ? place.zeros(size, t.x.dtype) : place.empty(size, t.x.dtype);
  const bool even = even_weights(pass.weights, H) && aligned(t.c_all, kAligned) && even_gradient(t.dy);
  Kernel* kernel = asked.device->find({asked.row, pass.rows.kind(bool(t.dc_all)), kept, even, false});
  FASTLSTM_CHECK(kernel, "fastlstm: no kernel for this call was compiled ahead");
  Arguments a;
  a.set(k_gates, kept ? t.gates : again);
  set_rows(&a, pass.rows, H, D);
  set_weights(&a, pass.weights, false);
  set_biases(&a, pass.then());
  a.set(k_c0, c0);
  a.set(k_c_all, t.c_all);
  a.set(k_dy, t.dy);
  a.set(k_dc_all, t.dc_all);
  a.set(k_dh_n, dh_n);
  a.set(k_dc_n, dc_n);
  a.set(k_dgates, dgates);
  a.set(k_dh0, t.dh0);
  a.set(k_dc0, t.dc0);
  set_strides(&a, k_dy_t, k_dy_b, t.dy);
  set_strides(&a, k_dc_t, k_dc_b, t.dc_all);
  asked.device->launch(kernel, &a, (pass.rows.B + kernel->batch - 1) / kernel->batch, D);
  pass.write_dx(t.dx, dgates);
  if (apart)
    pass.write_dweights(t.dweights, dgates);
  else if (each)
    launch_weight_gradients(asked, pass.rows, t.x, t.y, h0, dgates, t.dweights);
}

constexpr const char* kBackwardJit = "fastlstm::lstm_bwd_triton_jit";

// Of each direction all but the gradient of its second bias, which is that of the first.
HandleList without_second_bias(const std::vector<Array>& dweights, i64 D) {
  const size_t each = dweights.size() / size_t(D);
  HandleList found;
  for (size_t k = 0; k < dweights.size(); ++k)
    if (k % each != 3) found.push_back(shared(dweights[k]));
  return found;
}

// What is not compiled ahead.
void leave(Given& t, i64 D) {
  instead(kBackwardJit, given(t.x), given(t.weights), D, given_or_none(t.h0), given_or_none(t.c0), kAbsent, kAbsent,
          kAbsent, given(t.y), given(t.c_all), given_or_none(t.gates), given_or_none(t.dy), given_or_none(t.dh_n),
          given_or_none(t.dc_n), kAbsent, shared_or_none(t.dx), shared_or_none(t.dh0), shared_or_none(t.dc0),
          without_second_bias(t.dweights, D), kAbsent, false, false, kAbsent, 0.0, 0.0, kAbsent);
  const size_t each = t.dweights.size() / size_t(D);
  for (size_t k = 3; k < t.dweights.size(); k += 4)
    if (each == 4) copy(t.dweights[k], t.dweights[k - 1]);
}

}  // namespace

void lstm_bwd_triton(Handle x, const HandleList& weights, i64 directions, OptionalHandle h0, OptionalHandle c0,
                     OptionalHandle batch_sizes, OptionalHandle lengths, OptionalHandle reset, Handle y, Handle c_all,
                     OptionalHandle gates, OptionalHandle dy, OptionalHandle dh_n, OptionalHandle dc_n,
                     OptionalHandle dc_all, OptionalHandle dx, OptionalHandle dh0, OptionalHandle dc0,
                     const HandleList& dweights, OptionalHandle cache, bool peephole, bool layer_norm,
                     OptionalHandle h_mask_, double zoneout_c, double zoneout_h, OptionalHandle seed_) {
  const bool more = peephole || layer_norm || h_mask_ || zoneout_c != 0 || zoneout_h != 0;
  Given t{Array(x),     to_arrays(weights), Array(h0),    Array(c0),    Array(batch_sizes), Array(lengths),
          Array(reset), Array(y),           Array(c_all), Array(gates), Array(dy),          Array(dh_n),
          Array(dc_n),  Array(dc_all),      Array(dx),    Array(dh0),   Array(dc0),         to_arrays(dweights),
          Array(cache)};
  Array h_mask(h_mask_), seed(seed_);
  const Question asked(t.x, t.weights.data(), t.weights.size(), directions, true, t.batch_sizes, more);
  if (asked.row) return run(asked, t, directions);
  instead(kBackwardJit, given(t.x), given(t.weights), directions, given_or_none(t.h0), given_or_none(t.c0),
          given_or_none(t.batch_sizes), given_or_none(t.lengths), given_or_none(t.reset), given(t.y), given(t.c_all),
          given_or_none(t.gates), given_or_none(t.dy), given_or_none(t.dh_n), given_or_none(t.dc_n),
          given_or_none(t.dc_all), given_or_none(t.dx), given_or_none(t.dh0), given_or_none(t.dc0), given(t.dweights),
          given_or_none(t.cache), peephole, layer_norm, given_or_none(h_mask), zoneout_c, zoneout_h,
          given_or_none(seed));
}

std::vector<Output> lstm_plain_bwd_triton(Handle x, const HandleList& weights, i64 directions, OptionalHandle h0,
                                          OptionalHandle c0, Handle y, Handle c_all, Handle gates, OptionalHandle dy,
                                          OptionalHandle dh_n, OptionalHandle dc_n, bool dx, bool dh0, bool dc0,
                                          bool dweights, bool tf32) {
  Given t{Array(x), to_arrays(weights), Array(h0),    Array(c0), {},          {},         {},
          Array(y), Array(c_all),       Array(gates), Array(dy), Array(dh_n), Array(dc_n)};
  const i64 D = directions;
  const Question asked(t.x, t.weights.data(), t.weights.size(), D, true, t.batch_sizes, false, tf32);
  const Place place = Place::of(t.x.handle());
  const auto like = [&](const Array& of) { return place.empty(Sizes_(of.sizes, of.sizes + of.dim), t.x.dtype); };
  FASTLSTM_CHECK(t.x.dim == 3, "fastlstm: expected input [T, B, I], got ", t.x.shape_text());
  FASTLSTM_CHECK(t.weights.size() > 1 && t.weights[1].dim == 2, "fastlstm: expected the weights of a layer");
  const Sizes_ state{D, t.x.sizes[1], t.weights[1].last()};
  if (dx) t.dx = like(t.x);
  if (dh0) t.dh0 = place.empty(state, t.x.dtype);
  if (dc0) t.dc0 = place.empty(state, t.x.dtype);
  if (dweights)
    for (const Array& each : t.weights) t.dweights.push_back(like(each));
  if (t.dy && !t.dy.last_dense()) t.dy = dense(std::move(t.dy), place);
  asked.row ? run(asked, t, D) : leave(t, D);
  std::vector<Output> found;
  for (Array* each : {&t.dx, &t.dh0, &t.dc0})
    if (*each) found.push_back(each->release());
  for (Array& each : t.dweights) found.push_back(each.release());
  return found;
}

}  // namespace fastlstm::ahead
