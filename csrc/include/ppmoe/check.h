// Argument errors, in the words that ppmoe_ops/_checks.py uses too.
//
// std::invalid_argument reaches Python as ValueError and std::out_of_range as IndexError. The stock
// check macro is not used: it prints source paths of the build machine.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace ppmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
[[noreturn]] void bad_value(const Parts&... parts) {
  throw std::invalid_argument(concat(parts...));
}

template <class... Parts>
[[noreturn]] void bad_index(const Parts&... parts) {
  throw std::out_of_range(concat(parts...));
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    default: return torch::headeronly::toString(dtype);
  }
}

inline void check_dim(const char* op, const char* argument, const Tensor& tensor,
                      const char* axes) {
  int64_t expected = 1;
  for (const char* c = axes; *c != 0; ++c) expected += *c == ',';
  if (tensor.dim() != expected) {
    bad_value(op, ": ", argument, " has ", tensor.dim(), " axes; expected ", expected, ": [", axes,
              "]");
  }
}

inline void check_size(const char* op, const char* argument, const char* axis, int64_t came,
                       int64_t allowed, const char* why) {
  if (came != allowed) {
    bad_value(op, ": ", argument, " has ", axis, " = ", came, "; expected ", allowed, " (", why,
              ")");
  }
}

// `subject` is what the sentence begins with after the operator's name: "x", "the result".
inline void check_dtype(const char* op, const char* subject, ScalarType came,
                        std::initializer_list<ScalarType> allowed, const char* why = nullptr) {
  std::string names;
  for (ScalarType each : allowed) {
    if (each == came) return;
    names += (names.empty() ? "" : ", ") + std::string(dtype_name(each));
  }
  const std::string reason = why != nullptr ? concat(" (", why, ")") : "";
  bad_value(op, ": ", subject, " has dtype ", dtype_name(came), "; allowed: ", names, reason);
}

inline void check_dtype(const char* op, const char* argument, const Tensor& tensor,
                        std::initializer_list<ScalarType> allowed, const char* why = nullptr) {
  check_dtype(op, argument, tensor.scalar_type(), allowed, why);
}

inline void check_between(const char* op, const char* argument, int64_t came, int64_t low,
                          int64_t high, const char* why = nullptr) {
  if (came < low || came > high) {
    const std::string reason = why != nullptr ? concat(" (", why, ")") : "";
    bad_value(op, ": ", argument, " is ", came, "; allowed: ", low, " to ", high, reason);
  }
}

inline constexpr std::initializer_list<ScalarType> kFloats = {
    ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};
inline constexpr std::initializer_list<ScalarType> kIds = {ScalarType::Int, ScalarType::Long};

}  // namespace ppmoe
