// Errors of the operators.
#pragma once

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

// Throws std::runtime_error with the text of all further arguments unless the condition holds. Users see that sentence
// alone: STD_TORCH_CHECK would begin it with the function and the file that found the mistake.
#define FASTLSTM_CHECK(condition, ...)                                                                            \
  do {                                                                                                            \
    if (!(condition)) throw std::runtime_error(torch::headeronly::detail::stdTorchCheckMsgImpl("", __VA_ARGS__)); \
  } while (false)

namespace fastlstm {

// A dtype by torch's number, as Python writes it.
inline std::string dtype_text(int32_t dtype) {
  const struct {
    int32_t number;
    const char* name;
  } known[] = {
      {aoti_torch_dtype_float32(), "float32"},     {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},   {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_int64(), "int64"},         {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int16(), "int16"},         {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},         {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex64(), "complex64"}, {aoti_torch_dtype_complex128(), "complex128"},
  };
  for (const auto& each : known)
    if (each.number == dtype) return std::string("torch.") + each.name;
  return "dtype " + std::to_string(dtype) + " of torch";
}

}  // namespace fastlstm
