// Defines the kernels of a regime and their table: see arguments.h.
#pragma once

#include "backward.h"
#include "forward.h"
#include "wide_backward.h"
#include "wide_forward.h"

namespace fastlstm::cuda {

// One pair of kernels for 8 * NT sequences, and their line of the table.
#define FASTLSTM_NAME(pass, regime, kind, NT, resident) lstm_##pass##_##regime##_##kind##_n##NT##_r##resident
#define FASTLSTM_DEFINE(regime, X, kind, E, NT, resident)                                               \
  KERNEL(kMaxWarps* kLanes) FASTLSTM_NAME(fwd, regime, kind, NT, resident)(const ARGUMENT Forward p) {  \
    lstm_forward<E, NT, resident, X>(p);                                                                \
  }                                                                                                     \
  KERNEL(kMaxWarps* kLanes) FASTLSTM_NAME(bwd, regime, kind, NT, resident)(const ARGUMENT Backward p) { \
    lstm_backward<E, NT, resident, X>(p);                                                               \
  }
#define FASTLSTM_LIST(regime, X, kind, E, NT, resident) \
  {E::kKind,                                            \
   NT * kSequences,                                     \
   resident,                                            \
   FASTLSTM_NAME(fwd, regime, kind, NT, resident),      \
   FASTLSTM_NAME(bwd, regime, kind, NT, resident),      \
   nullptr,                                             \
   nullptr},

// As many weights in registers as a thread has room for beside the sums of one or two tiles of sequences, without
// spilling: see plan.cpp, which chooses among these.
#define FASTLSTM_KERNELS(F, regime, X, tf32_resident, wide_resident) \
  F(regime, X, bf16, Bf16, 1, 8)                                     \
  F(regime, X, bf16, Bf16, 2, wide_resident)                         \
  F(regime, X, f16, F16, 1, 8)                                       \
  F(regime, X, f16, F16, 2, wide_resident)                           \
  F(regime, X, tf32, Tf32, 1, tf32_resident)                         \
  F(regime, X, tf32, Tf32, 2, 2)                                     \
  F(regime, X, exact, Exact, 1, 0)                                   \
  F(regime, X, exact, Exact, 2, 0)
// For layers that need no more: several blocks then share a multiprocessor.
#define FASTLSTM_NARROW_KERNELS(F, regime, X) \
  F(regime, X, bf16, Bf16, 1, 4)              \
  F(regime, X, bf16, Bf16, 2, 4)              \
  F(regime, X, f16, F16, 1, 4)                \
  F(regime, X, f16, F16, 2, 4)

// The pairs of the regime wide, of 8 sequences: for each of kWideShapes (plan.h) one for any rows and one for dense
// ones.
#define FASTLSTM_DENSE_NAME(pass, kind, resident) lstm_##pass##_wide_##kind##_n1_r##resident##_dense
#define FASTLSTM_DEFINE_WIDE_PAIR(forward, backward, E, resident, dense)               \
  KERNEL((WideSizes<resident, dense>::kThreads)) forward(const ARGUMENT Forward p) {   \
    wide_forward<E, WideSizes<resident, dense>>(p);                                    \
  }                                                                                    \
  KERNEL((WideSizes<resident, dense>::kThreads)) backward(const ARGUMENT Backward p) { \
    wide_backward<E, WideSizes<resident, dense>>(p);                                   \
  }
#define FASTLSTM_DEFINE_WIDE(kind, E, resident)                                                                       \
  FASTLSTM_DEFINE_WIDE_PAIR(FASTLSTM_NAME(fwd, wide, kind, 1, resident), FASTLSTM_NAME(bwd, wide, kind, 1, resident), \
                            E, resident, false)                                                                       \
  FASTLSTM_DEFINE_WIDE_PAIR(FASTLSTM_DENSE_NAME(fwd, kind, resident), FASTLSTM_DENSE_NAME(bwd, kind, resident), E,    \
                            resident, true)
#define FASTLSTM_LIST_WIDE(kind, E, resident)   \
  {E::kKind,                                    \
   kSequences,                                  \
   resident,                                    \
   FASTLSTM_NAME(fwd, wide, kind, 1, resident), \
   FASTLSTM_NAME(bwd, wide, kind, 1, resident), \
   FASTLSTM_DENSE_NAME(fwd, kind, resident),    \
   FASTLSTM_DENSE_NAME(bwd, kind, resident)},
#define FASTLSTM_WIDE_KERNELS(F) \
  F(bf16, Bf16, 4)               \
  F(bf16, Bf16, 28)              \
  F(f16, F16, 4)                 \
  F(f16, F16, 28)

}  // namespace fastlstm::cuda
