// The cell of nn.RNN: h_new = tanh(z) or relu(z), where z is the sum of the one gate.
#pragma once

#include "cpu/cells/cell.h"

namespace fastlstm {
namespace {

// NaN stays NaN.
template <class V>
FASTLSTM_INLINE V rnn_hidden(V z, bool relu) {
  return relu ? (z < 0 ? V{} : z) : tanh(z);
}

// Gradient of z from dh, that of h_new; the derivative follows from h_new itself. Where h_new is NaN the gradient
// passes relu, as in PyTorch.
template <class V>
FASTLSTM_INLINE V rnn_grad(V dh, V h, bool relu) {
  return relu ? (h <= 0 ? V{} : dh) : dh * (1 - h * h);
}

}  // namespace
}  // namespace fastlstm
