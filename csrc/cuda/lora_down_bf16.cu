#include "cuda/lora_down.cuh"

template void fasttune::cuda::launch_lora_down_of<__nv_bfloat16>(const LoraDown& args,
                                                                 Stream stream);
