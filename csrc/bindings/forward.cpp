// The forward operators: a layer in training, or in inference with options.
#include "bindings/members.h"
#include "bindings/operators.h"

namespace fastlstm {

void lstm_fwd_cpu(Handle x_, const HandleList& weights_, i64 directions, OptionalHandle h0_, OptionalHandle c0_,
                  OptionalHandle batch_sizes_, OptionalHandle lengths_, OptionalHandle reset_, Handle y_, Handle h_n_,
                  Handle c_n_, OptionalHandle c_all_, OptionalHandle gates_, OptionalHandle cache_, bool peephole,
                  bool layer_norm, OptionalHandle h_mask_, double zoneout_c, double zoneout_h, OptionalHandle seed_,
                  i64 members) {
  const std::vector<Array> weights = to_arrays(weights_);
  const Array x(x_), h0(h0_), c0(c0_), batch_sizes(batch_sizes_), lengths(lengths_), reset(reset_), y(y_), h_n(h_n_),
      c_n(c_n_), c_all(c_all_), gates(gates_), cache(cache_), h_mask(h_mask_), seed(seed_);
  run_pass<Forward>(members, cache, x, weights, directions, h0, c0, batch_sizes, lengths, reset, y, h_n, c_n, c_all,
                    gates, peephole, layer_norm, h_mask, zoneout_c, zoneout_h, seed);
}

void rnn_fwd_cpu(Handle x_, const HandleList& weights_, i64 directions, OptionalHandle h0_, OptionalHandle batch_sizes_,
                 OptionalHandle lengths_, OptionalHandle reset_, bool relu, Handle y_, Handle h_n_,
                 OptionalHandle cache_, i64 members) {
  const std::vector<Array> weights = to_arrays(weights_);
  const Array x(x_), h0(h0_), batch_sizes(batch_sizes_), lengths(lengths_), reset(reset_), y(y_), h_n(h_n_),
      cache(cache_);
  run_pass<Forward>(members, cache, x, weights, directions, h0, batch_sizes, lengths, reset, relu, y, h_n);
}

}  // namespace fastlstm
