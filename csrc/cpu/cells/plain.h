// The cell of nn.LSTM. For one step, with gates i, f, g, o after their activation:
//
//   c_new = f * c + i * g
//   h_new = o * tanh(c_new)
//
// A row's gates lie in tile order (pack.h): of n units at a time n values of i, then f, g and o.
#pragma once

#include "cpu/cells/cell.h"

namespace fastlstm {
namespace {

// The gates, or the gradients of the gate sums, of up to kLanes units.
template <class S>
struct Gates {
  Vec<S> i, f, g, o;
};

template <class S>
FASTLSTM_INLINE Gates<S> load_gates(const S* gates, i64 n) {
  return {load_n(gates, n), load_n(gates + n, n), load_n(gates + 2 * n, n), load_n(gates + 3 * n, n)};
}
template <class S>
FASTLSTM_INLINE void store_gates(S* gates, const Gates<S>& of, i64 n) {
  store_n(gates, of.i, n);
  store_n(gates + n, of.f, n);
  store_n(gates + 2 * n, of.g, n);
  store_n(gates + 3 * n, of.o, n);
}

// ---- forward ------------------------------------------------------------------------------------------------

// Activates the gates of n units, in place.
template <class S>
FASTLSTM_INLINE void activate(S* gates, i64 n) {
  store_n(gates, sigmoid(load_n(gates, n)), n);
  store_n(gates + n, sigmoid(load_n(gates + n, n)), n);
  store_n(gates + 2 * n, tanh(load_n(gates + 2 * n, n)), n);
  store_n(gates + 3 * n, sigmoid(load_n(gates + 3 * n, n)), n);
}

template <class V>
FASTLSTM_INLINE V next_cell(V i, V f, V g, V c) {
  return fma(f, c, i * g);
}
template <class V>
FASTLSTM_INLINE V next_hidden(V o, V tanh_c) {
  return o * tanh_c;
}

// ---- backward -----------------------------------------------------------------------------------------------

// Gradient of c_new. dh: gradient of h_new; dc: gradient that c_new has from later steps.
template <class V>
FASTLSTM_INLINE V cell_grad(V dh, V o, V tanh_c, V dc) {
  return fma(dh * o, 1 - tanh_c * tanh_c, dc);
}

// Gradients of the gate sums, before the activation: sigmoid' = s * (1 - s), tanh' = 1 - t * t. dcell: gradient of
// c_new.
template <class V>
FASTLSTM_INLINE V grad_of_i(V dcell, V i, V g) {
  return dcell * g * (i * (1 - i));
}
template <class V>
FASTLSTM_INLINE V grad_of_f(V dcell, V f, V c) {
  return dcell * c * (f * (1 - f));
}
template <class V>
FASTLSTM_INLINE V grad_of_g(V dcell, V i, V g) {
  return dcell * i * (1 - g * g);
}
template <class V>
FASTLSTM_INLINE V grad_of_o(V dh, V o, V tanh_c) {
  return dh * tanh_c * (o * (1 - o));
}

}  // namespace
}  // namespace fastlstm
