// Activations that cross the Python border as integer codes. Shared by CPU and CUDA code.
#pragma once

namespace fasttune {

enum class Activation : int {
  kSilu = 0,
  kGelu = 1,  // x Phi(x), Phi the normal distribution
  kGeluTanh = 2,
  kQuickGelu = 3,  // x sigmoid(1.702 x)
  kRelu = 4,
  kRelu2 = 5,  // relu squared
  kTanh = 6,
  kSigmoid = 7,
  kLeakyRelu = 8,  // 0.01 x below 0
};

// By code.
constexpr const char* kActivationNames[] = {"silu",  "gelu", "gelu_tanh", "quick_gelu", "relu",
                                            "relu2", "tanh", "sigmoid",   "leaky_relu"};

}  // namespace fasttune
