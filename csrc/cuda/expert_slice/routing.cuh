// Host side of the routing operators: checks that several of them make.
#pragma once

#include "ppmoe/launch.h"
#include "ppmoe/string_argument.h"

namespace ppmoe {

inline bool is_softmax(const char* op, const std::string& score) {
  if (score == "softmax") return true;
  if (score == "sigmoid") return false;
  bad_value(op, ": score is '", score, "'; allowed: softmax, sigmoid");
}

inline ScalarType wide_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

}  // namespace ppmoe
