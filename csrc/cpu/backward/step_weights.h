// Weight gradients of a loop over a cell. Each of its steps is a call of its own, which leaves the gradients of its
// gate sums. Later all rows of these steps make one product, so that a gradient as large as the weights is written once
// and not at every step.
#pragma once

#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/weight_grad.h"

namespace fastlstm {
namespace {

template <class S>
class StepWeightGrads {
 public:
  explicit StepWeightGrads(const WeightGradParams& p)
      : p_(p), s_(p.sizes), capacity_(smaller(kMost, larger(1, p.sizes.B))), x_(panels_of(s_.I)), h_(panels_of(s_.P)),
        dsums_(panels_of(s_.gate_units())), add_(p.add) {}

  void run() {
    for (i64 k = 0; k < p_.count; ++k)
      for (i64 b = 0; b < p_.steps[k].B; ++b) {
        put(p_.steps[k], b);
        if (++rows_ == capacity_) multiply();
      }
    if (rows_ || !add_) multiply();  // without any row they are zero
  }

 private:
  static constexpr i64 kMost = 4 * kChain;         // rows of a product: reading and writing the sums takes less then
  static constexpr i64 kTogether = 4 * kPanel<S>;  // gate units of a thread that pass over a panel of the inputs

  // [panels][capacity][kPanel]: the rows of n numbers, panel by panel.
  Buffer<S> panels_of(i64 n) const {
    Buffer<S> buffer(ceil_div(n, kPanel<S>) * capacity_ * kPanel<S>);
    if (n % kPanel<S>) buffer.zero();  // the padding is read
    return buffer;
  }
  S* panel(const Buffer<S>& of, i64 k) const { return &of[k / kPanel<S> * capacity_ * kPanel<S>]; }

  void put(const StepRows& step, i64 b) const {
    const auto copy = [&](const Buffer<S>& to, const Rows& from, Dtype dtype, i64 n) {
      for (i64 k = 0; k < n; k += kPanel<S>)
        convert_in(panel(to, k) + rows_ * kPanel<S>, from.data, dtype, b * from.batch + k, smaller(kPanel<S>, n - k));
    };
    copy(x_, step.x, p_.dtype, s_.I);
    copy(h_, step.h, p_.dtype, s_.P);
    copy(dsums_, step.dsums, sizeof(S) == 8 ? Dtype::f64 : Dtype::f32, s_.gate_units());
  }

  // Adds the product of the rows that are there. Threads share the gate units.
  void multiply() {
    parallel(*p_.threads, ceil_div(s_.gate_units(), kTogether), [&](i64 item) {
      const i64 begin = item * kTogether, end = smaller(begin + kTogether, s_.gate_units());
      product(p_.dw.w_ih, x_, s_.I, begin, end);
      product(p_.dw.w_hh, h_, s_.P, begin, end);
      for (i64 q = begin; q < end; q += kPanel<S>) bias(q, smaller(kPanel<S>, end - q));
    });
    rows_ = 0;
    add_ = true;
  }

  // Rows [begin, end) of a gradient [4H, K]. Inputs of one chain stay in L1 for all of them, the sums in L2.
  void product(void* out, const Buffer<S>& inputs, i64 K, i64 begin, i64 end) const {
    for (i64 k = 0; k < K; k += kPanel<S>)
      for (i64 row = 0; row == 0 || row < rows_; row += kChain)
        for (i64 q = begin; q < end; q += kPanel<S>)
          multiply_rows<S>(smaller(kPanel<S>, end - q), panel(dsums_, q) + row * kPanel<S>, 1, kPanel<S>,
                           smaller(kChain, rows_ - row), panel(inputs, k) + row * kPanel<S>, kPanel<S>,
                           static_cast<S*>(out) + q * K + k, K, smaller(kPanel<S>, K - k), add_ || row > 0);
  }
  void bias(i64 begin, i64 count) const {
    if (!p_.dw.b) return;
    S* out = static_cast<S*>(p_.dw.b) + begin;
    for_vectors<S>(count, [&](i64 k, i64 n) FASTLSTM_INLINE_LAMBDA {
      const Vec<S> sum = sum_rows<S>(panel(dsums_, begin) + k, kPanel<S>, rows_);
      store_n(out + k, add_ ? load_n(out + k, n) + sum : sum, n);
    });
  }

  const WeightGradParams& p_;
  const Sizes& s_;
  const i64 capacity_;             // rows of a product
  const Buffer<S> x_, h_, dsums_;  // rows that wait for their product
  i64 rows_ = 0;
  bool add_;
};

template <class S>
void step_weight_grads(const WeightGradParams& p) {
  StepWeightGrads<S>(p).run();
}

}  // namespace
}  // namespace fastlstm
