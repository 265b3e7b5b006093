// The operators of Triton's kernels, as fastlstm/kernels/operators.py defines them.
#pragma once

#include <string>
#include <tuple>

#include "triton/layer.h"

namespace fastlstm::ahead {

// forward.cpp
void lstm_fwd_triton(Handle x, const HandleList& weights, i64 directions, OptionalHandle h0, OptionalHandle c0,
                     OptionalHandle batch_sizes, OptionalHandle lengths, OptionalHandle reset, Handle y, Handle h_n,
                     Handle c_n, OptionalHandle c_all, OptionalHandle gates, OptionalHandle cache, bool peephole,
                     bool layer_norm, OptionalHandle h_mask, double zoneout_c, double zoneout_h, OptionalHandle seed);

// The same of a plain layer of dense rows; makes its outputs, those that backward needs too.
std::tuple<Output, Output, Output, Output, Output> lstm_plain_fwd_triton(Handle x, const HandleList& weights,
                                                                         i64 directions, OptionalHandle h0,
                                                                         OptionalHandle c0, bool tf32);

// A stack of plain layers in inference, as lstm_infer_cpu; throws where a layer is not compiled ahead.
std::tuple<Output, Output, Output> lstm_infer_triton(Handle x, const HandleList& weights, i64 layers, i64 directions,
                                                     OptionalHandle h0, OptionalHandle c0, const HandleList& caches,
                                                     bool tf32);

// backward.cpp
void lstm_bwd_triton(Handle x, const HandleList& weights, i64 directions, OptionalHandle h0, OptionalHandle c0,
                     OptionalHandle batch_sizes, OptionalHandle lengths, OptionalHandle reset, Handle y, Handle c_all,
                     OptionalHandle gates, OptionalHandle dy, OptionalHandle dh_n, OptionalHandle dc_n,
                     OptionalHandle dc_all, OptionalHandle dx, OptionalHandle dh0, OptionalHandle dc0,
                     const HandleList& dweights, OptionalHandle cache, bool peephole, bool layer_norm,
                     OptionalHandle h_mask, double zoneout_c, double zoneout_h, OptionalHandle seed);

// The same of what lstm_plain_fwd_triton has computed; makes the gradients that are wanted.
std::vector<Output> lstm_plain_bwd_triton(Handle x, const HandleList& weights, i64 directions, OptionalHandle h0,
                                          OptionalHandle c0, Handle y, Handle c_all, Handle gates, OptionalHandle dy,
                                          OptionalHandle dh_n, OptionalHandle dc_n, bool dx, bool dh0, bool dc0,
                                          bool dweights, bool tf32);

// layer.cpp: what an operator in Python says of the error that it is about to raise.
void triton_failed(std::string why);

}  // namespace fastlstm::ahead
