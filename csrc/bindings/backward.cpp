// The backward operators.
#include "bindings/members.h"
#include "bindings/operators.h"

namespace fastlstm {

void lstm_bwd_cpu(Handle x_, const HandleList& weights_, i64 directions, OptionalHandle h0_, OptionalHandle c0_,
                  OptionalHandle batch_sizes_, OptionalHandle lengths_, OptionalHandle reset_, Handle y_, Handle c_all_,
                  OptionalHandle gates_, OptionalHandle dy_, OptionalHandle dh_n_, OptionalHandle dc_n_,
                  OptionalHandle dc_all_, OptionalHandle dx_, OptionalHandle dh0_, OptionalHandle dc0_,
                  const HandleList& dweights_, OptionalHandle cache_, bool peephole, bool layer_norm,
                  OptionalHandle h_mask_, double zoneout_c, double zoneout_h, OptionalHandle seed_, i64 members) {
  const std::vector<Array> weights = to_arrays(weights_), dweights = to_arrays(dweights_);
  const Array x(x_), h0(h0_), c0(c0_), batch_sizes(batch_sizes_), lengths(lengths_), reset(reset_), y(y_),
      c_all(c_all_), gates(gates_), dy(dy_), dh_n(dh_n_), dc_n(dc_n_), dc_all(dc_all_), dx(dx_), dh0(dh0_), dc0(dc0_),
      cache(cache_), h_mask(h_mask_), seed(seed_);
  run_pass<Backward>(members, cache, x, weights, directions, h0, c0, batch_sizes, lengths, reset, y, c_all, gates, dy,
                     dh_n, dc_n, dc_all, dx, dh0, dc0, dweights, peephole, layer_norm, h_mask, zoneout_c, zoneout_h,
                     seed);
}

void rnn_bwd_cpu(Handle x_, const HandleList& weights_, i64 directions, OptionalHandle h0_, OptionalHandle batch_sizes_,
                 OptionalHandle lengths_, OptionalHandle reset_, bool relu, Handle y_, OptionalHandle dy_,
                 OptionalHandle dh_n_, OptionalHandle dx_, OptionalHandle dh0_, const HandleList& dweights_,
                 OptionalHandle cache_, i64 members) {
  const std::vector<Array> weights = to_arrays(weights_), dweights = to_arrays(dweights_);
  const Array x(x_), h0(h0_), batch_sizes(batch_sizes_), lengths(lengths_), reset(reset_), y(y_), dy(dy_), dh_n(dh_n_),
      dx(dx_), dh0(dh0_), cache(cache_);
  run_pass<Backward>(members, cache, x, weights, directions, h0, batch_sizes, lengths, reset, relu, y, dy, dh_n, dx,
                     dh0, dweights);
}

}  // namespace fastlstm
