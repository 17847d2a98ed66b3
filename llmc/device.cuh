// device.cuh: the GPU a run uses: opened once, described once.
#pragma once
#include <algorithm>
#include <string>

#include "cuda_common.cuh"

struct GpuDevice {
    std::string name;            // "NVIDIA H200"
    int compute_capability = 0;  // 90 for 9.0
    size_t total_bytes = 0;
    size_t free_bytes = 0;  // when it was opened
};

// Whether there is one that CUDA can use.
inline bool has_gpu() {
    int num_devices = 0;
    return cudaGetDeviceCount(&num_devices) == cudaSuccess && num_devices > 0;
}

// Makes GPU `index` the current device. Throws one sentence when there is no driver, no GPU, no such GPU, or one too
// old for bf16 tensor cores.
inline GpuDevice open_device(int index) {
    int num_devices = 0;
    const cudaError_t status = cudaGetDeviceCount(&num_devices);
    CHECK(
        status != cudaErrorInsufficientDriver,
        "no usable NVIDIA GPU: the driver is missing or older than this program's CUDA %d.%d; install a newer one, or "
        "train on the CPU with train_gpt_cpu",
        CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    CHECK(status != cudaErrorNoDevice && (status != cudaSuccess || num_devices > 0),
          "no NVIDIA GPU found: this program needs one; train_gpt_cpu takes the same flags and runs on the CPU");
    CHECK(status == cudaSuccess, "the GPU cannot be used: %s", cudaGetErrorString(status));
    CHECK(index >= 0 && index < num_devices,
          "--device %d: there is no such GPU; the nearest that works is %d (this machine has %d, numbered from 0)",
          index, std::clamp(index, 0, num_devices - 1), num_devices);
    CUDA_CHECK(cudaSetDevice(index));
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
    GpuDevice device;
    device.name = properties.name;
    device.compute_capability = 10 * properties.major + properties.minor;
    CHECK(device.compute_capability >= 80,
          "GPU %d is a %s of compute capability %d.%d: bf16 tensor cores need 8.0 (A100) or newer", index,
          properties.name, properties.major, properties.minor);
    CUDA_CHECK(cudaMemGetInfo(&device.free_bytes, &device.total_bytes));
    return device;
}
