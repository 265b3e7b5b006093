// The two passes of a layer. A constructor checks every argument of an operator and fills the parameters of the
// kernels; `run` then computes. The arguments are those of the operators, with the names and shapes of their schemas.
#pragma once

#include <vector>

#include "bindings/packed_weights.h"

namespace fastlstm {

// torch's thread pool.
Threads torch_threads();

struct Forward {
  Call call;
  ForwardParams p{};

  // An LSTM.
  Forward(const Array& x, const std::vector<Array>& weights, i64 directions, const Array& h0, const Array& c0,
          const Array& batch_sizes, const Array& lengths, const Array& reset, const Array& y, const Array& h_n,
          const Array& c_n, const Array& c_all, const Array& gates, bool peephole, bool layer_norm, const Array& h_mask,
          double zoneout_c, double zoneout_h, const Array& seed);
  // A plain LSTM that keeps nothing for backward.
  Forward(Call&& call_, const Array& x, const Array& h0, const Array& c0, const Array& y, const Array& h_n,
          const Array& c_n);
  // An RNN.
  Forward(const Array& x, const std::vector<Array>& weights, i64 directions, const Array& h0, const Array& batch_sizes,
          const Array& lengths, const Array& reset, bool relu, const Array& y, const Array& h_n);
  Forward(const Forward&) = delete;

  PackedWeights::Orders orders() const;
  void run(const PackedWeights& packed, Threads threads);
  void run(const Array& cache) { run(PackedWeights(call, orders(), cache), torch_threads()); }

 private:
  Forward(Call&& call_, const Array& x, const Array& h0, const Array& y, const Array& h_n);
};

struct Backward {
  Call call;
  BackwardParams p{};

  // An LSTM.
  Backward(const Array& x, const std::vector<Array>& weights, i64 directions, const Array& h0, const Array& c0,
           const Array& batch_sizes, const Array& lengths, const Array& reset, const Array& y, const Array& c_all,
           const Array& gates, const Array& dy, const Array& dh_n, const Array& dc_n, const Array& dc_all,
           const Array& dx, const Array& dh0, const Array& dc0, const std::vector<Array>& dweights, bool peephole,
           bool layer_norm, const Array& h_mask, double zoneout_c, double zoneout_h, const Array& seed);
  // An RNN.
  Backward(const Array& x, const std::vector<Array>& weights, i64 directions, const Array& h0, const Array& batch_sizes,
           const Array& lengths, const Array& reset, bool relu, const Array& y, const Array& dy, const Array& dh_n,
           const Array& dx, const Array& dh0, const std::vector<Array>& dweights);
  Backward(const Backward&) = delete;

  PackedWeights::Orders orders() const;
  void run(const PackedWeights& packed, Threads threads);

 private:
  Backward(Call&& call_, const Array& x, const Array& h0, const Array& reset, const Array& y, const Array& dy,
           const Array& dh_n, const Array& dx, const Array& dh0, const std::vector<Array>& dweights);
};

}  // namespace fastlstm
