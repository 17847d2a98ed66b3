// flash_attention_hopper.cuh: attention for sm_90a, head dims 64 and 128: which of its two passes this version has.
#pragma once
#if __has_include("flash_attention_hopper_forward.cuh")
#include "flash_attention_hopper_forward.cuh"
#define LLMC_HOPPER_FORWARD
#endif
#if __has_include("flash_attention_hopper_backward_launch.cuh")
#include "flash_attention_hopper_backward_launch.cuh"
#define LLMC_HOPPER_BACKWARD
#endif
