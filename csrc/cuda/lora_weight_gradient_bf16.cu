#include "cuda/lora_weight_gradient.cuh"

template void fasttune::cuda::launch_lora_weight_gradient_of<__nv_bfloat16>(
    const LoraWeightGradient& args, Stream stream);
