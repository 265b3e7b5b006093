// Weight gradients of a loop over a cell. Each of its steps is a call of its own, which leaves the gradients of its
// gate sums. Later all rows of these steps make one product, so that a gradient as large as the weights is written once
// and not at every step.
#pragma once

#include "cpu/backward/chunk.h"
#include "cpu/parallel.h"
#include "cpu/weight_grad.h"

namespace fastlstm {
namespace {

// As many rows as one chain adds up.
template <class S>
class StepWeightGrads {
 public:
  explicit StepWeightGrads(const WeightGradParams& p)
      : p_(p), s_(p.sizes), x_(rows_of(s_.I)), h_(rows_of(s_.P)), dsums_(rows_of(s_.gate_units())), add_(p.add) {}

  void run() {
    for (i64 k = 0; k < p_.count; ++k)
      for (i64 b = 0; b < p_.steps[k].B; ++b) {
        put(p_.steps[k], b);
        if (++rows_ == kChain) multiply();
      }
    if (rows_ || !add_) multiply();  // without any row they are zero
  }

 private:
  // Their padding is read, see BackwardDirection::zeros.
  static Buffer<S> rows_of(i64 n) {
    Buffer<S> buffer(kChain * pitch<S>(n));
    buffer.zero();
    return buffer;
  }

  void put(const StepRows& step, i64 b) const {
    convert_in(&x_[rows_ * pitch<S>(s_.I)], step.x.data, p_.dtype, b * step.x.batch, s_.I);
    convert_in(&h_[rows_ * pitch<S>(s_.P)], step.h.data, p_.dtype, b * step.h.batch, s_.P);
    std::memcpy(&dsums_[rows_ * pitch<S>(s_.gate_units())], element<S>(step.dsums.data, b * step.dsums.batch),
                size_t(s_.gate_units()) * sizeof(S));
  }

  // Adds the product of the rows that are there. Threads share the gate units.
  void multiply() {
    const i64 panels = ceil_div(s_.gate_units(), kPanel<S>), shares = smaller(panels, p_.threads->count());
    parallel(*p_.threads, shares, [&](i64 k) {
      const i64 begin = k * panels / shares * kPanel<S>;
      const i64 end = smaller((k + 1) * panels / shares * kPanel<S>, s_.gate_units());
      product(p_.dw.w_ih, x_, s_.I, begin, end);
      product(p_.dw.w_hh, h_, s_.P, begin, end);
      bias(begin, end);
    });
    rows_ = 0;
    add_ = true;
  }

  // Rows [begin, end) of a gradient [4H, K].
  void product(void* out, const Buffer<S>& inputs, i64 K, i64 begin, i64 end) const {
    const i64 sums_pitch = pitch<S>(s_.gate_units());
    for (i64 k = 0; k < K; k += kPanel<S>)
      multiply_rows<S>(end - begin, &dsums_[begin], 1, sums_pitch, rows_, &inputs[k], pitch<S>(K),
                       static_cast<S*>(out) + begin * K + k, K, smaller(kPanel<S>, K - k), add_);
  }
  void bias(i64 begin, i64 end) const {
    if (!p_.dw.b) return;
    S* out = static_cast<S*>(p_.dw.b) + begin;
    for_vectors<S>(end - begin, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
      const Vec<S> sum = sum_rows<S>(&dsums_[begin + k], pitch<S>(s_.gate_units()), rows_);
      store_n(out + k, add_ ? load_n(out + k, n) + sum : sum, n);
    });
  }

  const WeightGradParams& p_;
  const Sizes& s_;
  const Buffer<S> x_, h_, dsums_;  // [kChain][pitch of I], of P, of 4H: rows that wait for their product
  i64 rows_ = 0;
  bool add_;
};

template <class S>
void step_weight_grads(const WeightGradParams& p) {
  StepWeightGrads<S>(p).run();
}

}  // namespace
}  // namespace fastlstm
