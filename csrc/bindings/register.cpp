// Gives the operators to torch, on LibTorch's stable ABI.
#include "bindings/operators.h"
#include "out_of_memory.h"

namespace fastlstm {

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
  m.impl("lstm_fwd_cpu", TORCH_BOX(&Guarded<&lstm_fwd_cpu>::call));
  m.impl("lstm_bwd_cpu", TORCH_BOX(&Guarded<&lstm_bwd_cpu>::call));
  m.impl("lstm_infer_cpu", TORCH_BOX(&Guarded<&lstm_infer_cpu>::call));
  m.impl("lstm_plain_fwd_cpu", TORCH_BOX(&Guarded<&lstm_plain_fwd_cpu>::call));
  m.impl("lstm_plain_bwd_cpu", TORCH_BOX(&Guarded<&lstm_plain_bwd_cpu>::call));
  m.impl("lstm_cell_infer_cpu", TORCH_BOX(&Guarded<&lstm_cell_infer_cpu>::call));
  m.impl("lstm_cell_fwd_cpu", TORCH_BOX(&Guarded<&lstm_cell_fwd_cpu>::call));
  m.impl("lstm_cell_bwd_cpu", TORCH_BOX(&Guarded<&lstm_cell_bwd_cpu>::call));
  m.impl("lstm_cell_weight_grads_cpu", TORCH_BOX(&Guarded<&lstm_cell_weight_grads_cpu>::call));
  m.impl("quantized_infer_cpu", TORCH_BOX(&Guarded<&quantized_infer_cpu>::call));
  m.impl("rnn_fwd_cpu", TORCH_BOX(&Guarded<&rnn_fwd_cpu>::call));
  m.impl("rnn_bwd_cpu", TORCH_BOX(&Guarded<&rnn_bwd_cpu>::call));
}

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CompositeExplicitAutograd, m) {
  m.impl("cpu_cache_bytes", TORCH_BOX(&cpu_cache_bytes));
  m.impl("cpu_direct", TORCH_BOX(&cpu_direct));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("quantized_isa", TORCH_BOX(&quantized_isa));
  m.impl("cpu_plan", TORCH_BOX(&cpu_plan));
  m.impl("cuda_plan", TORCH_BOX(&cuda_plan));
  m.impl("cuda_obstacle", TORCH_BOX(&cuda_obstacle));
}

}  // namespace fastlstm
