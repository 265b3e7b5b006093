// The cells that have kernels of their own. A cell's arithmetic is in plain.h, extended.h and extended_row.h, or rnn.h:
// the forward step and its derivative side by side. Where the numbers lie is the lane's business.
#pragma once

#include "cpu/activations.h"

namespace fastlstm {
namespace {

// plain: the cell of nn.LSTM. extended: with peepholes, layer normalisation, recurrent dropout or zoneout.
// rnn: the cell of nn.RNN.
enum class Cell { plain, extended, rnn };

// Rows that go through each stage of a cell together. A single row would be a long chain of instructions that wait for
// each other; with many rows in flight the core does not wait.
constexpr i64 kRowGroup = 16;

}  // namespace
}  // namespace fastlstm
