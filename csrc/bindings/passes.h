// The two passes of a layer. A constructor checks every argument of an operator and fills the parameters of the
// kernels; `run` then computes. The arguments are those of the operators, with the names and shapes of their schemas.
#pragma once

#include <vector>

#include "bindings/packed_weights.h"
#include "cpu/parallel.h"

namespace fastlstm {

// Our own threads for a pass over a layer, at most as many as torch's: torch.set_num_threads and OMP_NUM_THREADS count.
// Calls of one kind and of about as many steps share what is known of how useful threads are to them.
class PassThreads : public Threads {
 public:
  PassThreads(const Sizes& sizes, bool backward, i64 members = 1);
  // For kernels with quantised weights.
  PassThreads(const Sizes& sizes, int (*worthwhile)(const Sizes&, bool int8, int threads), bool int8);

 private:
  PassThreads(int wanted, const Sizes& sizes, int kernels);
};

struct Forward {
  static constexpr bool kBackward = false;
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
  void run(const PackedWeights& packed, Threads& threads);
  void run(const Array& cache) {
    PassThreads threads(call.sizes, kBackward);
    together(threads, [&] { run(PackedWeights(call, orders(), cache, threads), threads); });
  }

 private:
  Forward(Call&& call_, const Array& x, const Array& h0, const Array& y, const Array& h_n);
};

struct Backward {
  static constexpr bool kBackward = true;
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
  // What both have; `set_cells` gives it the cell states of an LSTM.
  Backward(Call&& call_, const Array& x, const Array& h0, const Array& reset, const Array& y, const Array& dy,
           const Array& dh_n, const Array& dx, const Array& dh0, const std::vector<Array>& dweights);
  void set_cells(const Array& c0, const Array& dc_n, const Array& dc0);
  Backward(const Backward&) = delete;

  PackedWeights::Orders orders() const;
  void run(const PackedWeights& packed, Threads& threads);
};

}  // namespace fastlstm
