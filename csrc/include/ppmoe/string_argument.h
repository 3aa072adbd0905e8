// String arguments of operators, for CPU and CUDA alike.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <string>

namespace ppmoe {

// A string argument. Kernels take the handle and free it here: the stock conversion to std::string
// leaks one string a call.
class String {
 public:
  explicit String(StringHandle handle) {
    size_t length = 0;
    const char* data = nullptr;
    const bool read = torch_string_length(handle, &length) == AOTI_TORCH_SUCCESS &&
                      torch_string_c_str(handle, &data) == AOTI_TORCH_SUCCESS;
    if (read) text_.assign(data, length);
    torch_delete_string(handle);
    if (!read) throw std::runtime_error("ppmoe_ops: reading a string argument failed");
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

}  // namespace ppmoe
