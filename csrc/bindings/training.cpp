// The operators for latency in training: a plain LSTM layer, each pass one operator that makes its outputs.
#include <cstring>

#include "bindings/members.h"
#include "bindings/operators.h"

namespace fastlstm {
namespace {

Array contiguous(Array t) {
  if (!t || t.contiguous()) return t;
  AtenTensorHandle copy;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_new_tensor_handle(torch::stable::contiguous(torch::stable::Tensor(t.release().handle)).get(), &copy));
  return Array(copy);
}

Array last_dense(Array t) { return !t || t.last_dense() ? std::move(t) : contiguous(std::move(t)); }

// The tensors that both passes read.
struct Layer {
  Array x, h0, c0, batch_sizes, lengths, reset, cache;
  std::vector<Array> weights;
  i64 B, H, P, D, each;
  int32_t compute_type;

  Layer(Handle x_, const HandleList& weights_, i64 directions, OptionalHandle h0_, OptionalHandle c0_,
        OptionalHandle batch_sizes_, OptionalHandle lengths_, OptionalHandle reset_, OptionalHandle cache_)
      : x(last_dense(Array(x_))), h0(last_dense(Array(h0_))), c0(last_dense(Array(c0_))), batch_sizes(batch_sizes_),
        lengths(lengths_), reset(reset_), cache(cache_), D(directions) {
    for (Array& w : to_arrays(weights_)) weights.push_back(contiguous(std::move(w)));
    FASTLSTM_CHECK(x.dim == (batch_sizes ? 2 : 3), "fastlstm: expected input ", batch_sizes ? "[N, I]" : "[T, B, I]",
                   ", got ", x.shape_text());
    FASTLSTM_CHECK(directions == 1 || directions == 2, "fastlstm: expected 1 or 2 directions, got ", directions);
    FASTLSTM_CHECK(weights.size() > 1, "fastlstm: expected the weights of a layer");
    FASTLSTM_CHECK(weights[1].dim == 2, "fastlstm: expected weight_hh [4 * H, H], got ", weights[1].shape_text());
    B = batch_sizes ? first_batch() : x.sizes[1];
    H = weights[1].sizes[0] / 4;
    P = weights[1].sizes[1];
    each = i64(weights.size()) / D;
    compute_type = compute_type_of(dtype_of(x));
  }

  // New tensors with `last` numbers for each row of x: of all directions together, and of each.
  Array rows(i64 last, int32_t dtype) const {
    const i64* n = x.sizes;
    return batch_sizes ? Array::empty({n[0], last}, dtype) : Array::empty({n[0], n[1], last}, dtype);
  }
  Array rows_of_directions(i64 last, int32_t dtype) const {
    const i64* n = x.sizes;
    return batch_sizes ? Array::empty({D, n[0], last}, dtype) : Array::empty({D, n[0], n[1], last}, dtype);
  }

 private:
  i64 first_batch() const {
    FASTLSTM_CHECK(batch_sizes.dim == 1 && batch_sizes.sizes[0] > 0, "fastlstm: expected batch_sizes [T], got ",
                   batch_sizes.shape_text());
    batch_sizes.check_dtype("batch_sizes", aoti_torch_dtype_int64());
    batch_sizes.check_storage("batch_sizes");
    return static_cast<const i64*>(batch_sizes.data)[0];
  }
};

}  // namespace

std::tuple<Output, Output, Output, Output, Output> lstm_plain_fwd_cpu(Handle x_, const HandleList& weights_,
                                                                      i64 directions, OptionalHandle h0_,
                                                                      OptionalHandle c0_, OptionalHandle batch_sizes_,
                                                                      OptionalHandle lengths_, OptionalHandle reset_,
                                                                      OptionalHandle cache_) {
  const Layer layer(x_, weights_, directions, h0_, c0_, batch_sizes_, lengths_, reset_, cache_);
  const auto& [x, h0, c0, batch_sizes, lengths, reset, cache, weights, B, H, P, D, each, compute_type] = layer;
  const Array none;
  Array y = layer.rows(D * P, x.dtype), h_n = Array::empty({D, B, P}, x.dtype);
  Array c_n = Array::empty({D, B, H}, x.dtype), c_all = layer.rows(D * H, compute_type);
  Array gates = layer.rows_of_directions(4 * H, compute_type);
  run_pass<Forward>(0, cache, x, weights, D, h0, c0, batch_sizes, lengths, reset, y, h_n, c_n, c_all, gates, false,
                    false, none, 0.0, 0.0, none);
  return {y.release(), h_n.release(), c_n.release(), c_all.release(), gates.release()};
}

std::vector<Output> lstm_plain_bwd_cpu(Handle x_, const HandleList& weights_, i64 directions, OptionalHandle h0_,
                                       OptionalHandle c0_, Handle y_, Handle c_all_, Handle gates_, OptionalHandle dy_,
                                       OptionalHandle dh_n_, OptionalHandle dc_n_, bool wants_dx, bool wants_dh0,
                                       bool wants_dc0, bool wants_dweights, OptionalHandle batch_sizes_,
                                       OptionalHandle lengths_, OptionalHandle reset_, OptionalHandle cache_) {
  const Layer layer(x_, weights_, directions, h0_, c0_, batch_sizes_, lengths_, reset_, cache_);
  const auto& [x, h0, c0, batch_sizes, lengths, reset, cache, weights, B, H, P, D, each, compute_type] = layer;
  const Array y(y_), c_all(c_all_), gates(gates_), none;
  const Array dy = last_dense(Array(dy_)), dh_n = last_dense(Array(dh_n_)), dc_n = last_dense(Array(dc_n_));
  Array dx = wants_dx ? layer.rows(x.last(), compute_type) : Array();
  Array dh0 = wants_dh0 ? Array::empty({D, B, P}, compute_type) : Array();
  Array dc0 = wants_dc0 ? Array::empty({D, B, H}, compute_type) : Array();
  const bool bias = each > 3;
  std::vector<Array> dweights;  // one for both biases
  for (size_t k = 0; wants_dweights && k < weights.size(); ++k) {
    const Array& w = weights[k];
    if (bias && i64(k) % each == 3) continue;
    dweights.push_back(w.dim == 2 ? Array::empty({w.sizes[0], w.sizes[1]}, x.dtype)
                                  : Array::empty({w.sizes[0]}, x.dtype));
  }
  run_pass<Backward>(0, cache, x, weights, D, h0, c0, batch_sizes, lengths, reset, y, c_all, gates, dy, dh_n, dc_n,
                     none, dx, dh0, dc0, dweights, false, false, none, 0.0, 0.0, none);
  std::vector<Output> found;
  for (Array* t : {&dx, &dh0, &dc0})
    if (*t) found.push_back(t->release());
  for (size_t k = 0; k < dweights.size(); ++k) {
    Array& own = dweights[k];
    const bool of_bias = bias && i64(k) % (each - 1) == 2;
    Array other = of_bias ? Array::empty({4 * H}, x.dtype) : Array();
    if (of_bias) std::memcpy(other.data, own.data, size_t(4 * H) * aoti_torch_dtype_element_size(x.dtype));
    found.push_back(own.release());
    if (of_bias) found.push_back(other.release());
  }
  return found;
}

}  // namespace fastlstm
