// flash_attention_hopper.cuh: attention for sm_90a, head dims 64 and 128: wgmma, TMA, warps with separate jobs.
//   forward   flash_attention_hopper_forward.cuh, called through flash_attention_hopper_forward_launch.cuh
//   backward  flash_attention_hopper_backward.cuh, called through flash_attention_hopper_backward_launch.cuh
#pragma once
#include "flash_attention_hopper_backward_launch.cuh"
#include "flash_attention_hopper_forward_launch.cuh"
