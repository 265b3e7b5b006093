// The operators of this library. fastlstm/ops.py has their schemas; register.cpp gives them to torch.
//
// Arguments are raw handles, whose ownership comes with them: see array.h. Outputs are passed in, to be filled. Only
// the calls for latency return new tensors.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/array.h"
#include "lstm.h"

namespace fastlstm {

using Handle = AtenTensorHandle;
using OptionalHandle = std::optional<AtenTensorHandle>;
using HandleList = std::vector<AtenTensorHandle>;

// forward.cpp
void lstm_fwd_cpu(Handle x, const HandleList& weights, i64 directions, OptionalHandle h0, OptionalHandle c0,
                  OptionalHandle batch_sizes, OptionalHandle lengths, OptionalHandle reset, Handle y, Handle h_n,
                  Handle c_n, OptionalHandle c_all, OptionalHandle gates, OptionalHandle cache, bool peephole,
                  bool layer_norm, OptionalHandle h_mask, double zoneout_c, double zoneout_h, OptionalHandle seed,
                  i64 members);
void rnn_fwd_cpu(Handle x, const HandleList& weights, i64 directions, OptionalHandle h0, OptionalHandle batch_sizes,
                 OptionalHandle lengths, OptionalHandle reset, bool relu, Handle y, Handle h_n, OptionalHandle cache,
                 i64 members);

// backward.cpp
void lstm_bwd_cpu(Handle x, const HandleList& weights, i64 directions, OptionalHandle h0, OptionalHandle c0,
                  OptionalHandle batch_sizes, OptionalHandle lengths, OptionalHandle reset, Handle y, Handle c_all,
                  OptionalHandle gates, OptionalHandle dy, OptionalHandle dh_n, OptionalHandle dc_n,
                  OptionalHandle dc_all, OptionalHandle dx, OptionalHandle dh0, OptionalHandle dc0,
                  const HandleList& dweights, OptionalHandle cache, bool peephole, bool layer_norm,
                  OptionalHandle h_mask, double zoneout_c, double zoneout_h, OptionalHandle seed, i64 members);
void rnn_bwd_cpu(Handle x, const HandleList& weights, i64 directions, OptionalHandle h0, OptionalHandle batch_sizes,
                 OptionalHandle lengths, OptionalHandle reset, bool relu, Handle y, OptionalHandle dy,
                 OptionalHandle dh_n, OptionalHandle dx, OptionalHandle dh0, const HandleList& dweights,
                 OptionalHandle cache, i64 members);

// infer.cpp
std::tuple<Output, Output, Output> lstm_infer_cpu(Handle x, const HandleList& weights, i64 layers, i64 directions,
                                                  OptionalHandle h0, OptionalHandle c0, const HandleList& caches);
std::tuple<Output, Output> lstm_cell_infer_cpu(Handle x, const HandleList& weights, OptionalHandle h0,
                                               OptionalHandle c0, OptionalHandle cache);

// direct.cpp
std::vector<i64> cpu_direct(const std::vector<i64>& addresses);

// training.cpp
std::tuple<Output, Output, Output, Output, Output> lstm_plain_fwd_cpu(Handle x, const HandleList& weights,
                                                                      i64 directions, OptionalHandle h0,
                                                                      OptionalHandle c0, OptionalHandle batch_sizes,
                                                                      OptionalHandle lengths, OptionalHandle reset,
                                                                      OptionalHandle cache);
std::vector<Output> lstm_plain_bwd_cpu(Handle x, const HandleList& weights, i64 directions, OptionalHandle h0,
                                       OptionalHandle c0, Handle y, Handle c_all, Handle gates, OptionalHandle dy,
                                       OptionalHandle dh_n, OptionalHandle dc_n, bool wants_dx, bool wants_dh0,
                                       bool wants_dc0, bool wants_dweights, OptionalHandle batch_sizes,
                                       OptionalHandle lengths, OptionalHandle reset, OptionalHandle cache);

// cell.cpp
std::tuple<Output, Output, Output> lstm_cell_fwd_cpu(Handle x, const HandleList& weights, Handle h0, Handle c0,
                                                     OptionalHandle cache);
std::tuple<Output, Output, Output, Output> lstm_cell_bwd_cpu(Handle x, const HandleList& weights, Handle h0, Handle c0,
                                                             Handle kept, OptionalHandle dh, OptionalHandle dc,
                                                             bool wants_dx, bool wants_dh0, bool wants_dc0,
                                                             OptionalHandle cache);
void lstm_cell_weight_grads_cpu(const HandleList& x, const HandleList& h, const HandleList& dsums,
                                const HandleList& dweights, bool add);

// quantized.cpp
std::tuple<Output, Output, Output> quantized_infer_cpu(Handle x, const HandleList& weights, i64 gates, bool relu,
                                                       i64 inputs, i64 hidden, i64 projected, i64 layers,
                                                       i64 directions, OptionalHandle h0, OptionalHandle c0,
                                                       OptionalHandle batch_sizes, OptionalHandle lengths,
                                                       OptionalHandle reset);
std::string quantized_isa();

// plans.cpp
i64 cpu_cache_bytes(const std::string& purpose, i64 T, i64 B, i64 input, i64 hidden, i64 projected, i64 directions,
                    i64 gates, bool is_double);
std::string cpu_isa();
std::string cpu_plan(i64 T, i64 B, i64 input, i64 hidden, i64 projected, i64 directions, i64 threads,
                     const std::vector<i64>& machine);
std::vector<i64> cuda_plan(i64 kind, bool backward, i64 B, i64 hidden, i64 directions, const std::vector<i64>& device,
                           const std::vector<i64>& wish);
std::string cuda_obstacle(i64 kind, bool backward, i64 B, i64 hidden, i64 directions, const std::vector<i64>& device,
                          const std::vector<i64>& wish);

}  // namespace fastlstm
