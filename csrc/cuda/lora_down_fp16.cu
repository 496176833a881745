#include "cuda/lora_down.cuh"

template void fasttune::cuda::launch_lora_down_of<__half>(const LoraDown& args, Stream stream);
