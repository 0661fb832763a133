// What the row functions of ../xla.py are given, and where they are computed.
#pragma once

#include <cstdint>

namespace jaxent {

enum class Function {
  softmax,
  log_softmax,
  softmax_derivative,
  log_softmax_derivative,
  log_softmax_pullback,
  label_loss,
  label_loss_and_gradient,
  own_label_loss,  // without the mean over all classes
  own_label_loss_and_gradient,
  expected_loss,
  expected_loss_and_gradient,
  place,
};

enum class Type { f32, bf16, f16 };

// Arrays of logits' size are (outer, classes, inner), those of rows (outer, inner), all without gaps.
struct Call {
  Function function;
  int64_t outer, classes, inner;
  const char* x;            // the logits
  const char* t = nullptr;  // tangents, cotangents or probabilities, where the function has them
  char* out = nullptr;      // of logits' size, where the function has it; maybe the logits themselves
  Type x_type, t_type, out_type;
  const int32_t* label = nullptr;
  const float* factors[3] = {};  // of rows, null for those that are 0
  float* rows[3] = {};           // results of rows, where they are wanted
  int32_t* largest = nullptr;    // the first class of each row's largest logit, where it is wanted
};

// Runs tasks 0 to n - 1, in any order and on any threads, and returns after the last.
class Threads {
 public:
  virtual void run(int64_t n, void (*task)(const void* data, int64_t i), const void* data) = 0;

 protected:
  ~Threads() = default;
};

// The same for different instruction sets.
void run_avx512(const Call&, Threads&);
void run_avx2(const Call&, Threads&);
void run_base(const Call&, Threads&);

}  // namespace jaxent
