// gpu_properties.cuh: the properties of a GPU that choose kernels and sizes of scratch memory: of the current device
// or, in a process that only plans and has none (--fit), of the GPU that is planned for.
#pragma once
#include <algorithm>
#include <climits>
#include <optional>
#include <vector>

#include "cuda_common.cuh"

// What the driver takes of a multiprocessor's shared memory for each block, on every GPU from sm_80 on.
constexpr int RESERVED_SHARED_BYTES_PER_BLOCK = 1024;
// What a kernel with at most this much static shared memory takes of it: the size is rounded up to the alignment of
// dynamic shared memory, and that is the largest any kernel of the program asks for: 1024 bytes, the period of TMA's
// swizzle (ptx_hopper.cuh). Not asked of the kernel: scratch memory is planned without a GPU too.
constexpr int STATIC_SHARED_BYTES_PER_BLOCK = 1024;

struct GpuProperties {
    int compute_capability = 0;  // 90 for 9.0
    int num_sms = 0;
    int shared_bytes_per_sm = 0;  // that the blocks on a multiprocessor share

    // The most that a block can have, static and dynamic (cudaDevAttrMaxSharedMemoryPerBlockOptin).
    int shared_bytes_per_block() const { return shared_bytes_per_sm - RESERVED_SHARED_BYTES_PER_BLOCK; }
};

constexpr GpuProperties A100_PROPERTIES{80, 108, 164 * 1024};
constexpr GpuProperties A10_PROPERTIES{86, 72, 100 * 1024};
constexpr GpuProperties H100_PROPERTIES{90, 132, 228 * 1024};

// Unset wherever kernels are launched.
inline std::optional<GpuProperties>& assumed_gpu() {
    static std::optional<GpuProperties> properties;
    return properties;
}

// No GPU is said to have more of anything. Tests lower it: a larger GPU then does what a smaller one would.
inline GpuProperties& most_gpu_properties() {
    static GpuProperties most{INT_MAX, INT_MAX, INT_MAX};
    return most;
}

// Those of every GPU that this process sees, by index; asks the driver and creates no context.
inline std::vector<GpuProperties> query_gpus() {
    int num_devices;
    CUDA_CHECK(cudaGetDeviceCount(&num_devices));
    std::vector<GpuProperties> gpus(num_devices);
    for (int device = 0; device < num_devices; ++device) {
        GpuProperties& gpu = gpus[device];
        int major, minor;
        CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
        CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
        CUDA_CHECK(cudaDeviceGetAttribute(&gpu.num_sms, cudaDevAttrMultiProcessorCount, device));
        CUDA_CHECK(
            cudaDeviceGetAttribute(&gpu.shared_bytes_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
        gpu.compute_capability = 10 * major + minor;
    }
    return gpus;
}

// Cheap enough for every launch: the driver is asked once, and the language lets only one thread do it; afterwards the
// answers are only read, from any thread.
inline GpuProperties gpu_properties() {
    if (assumed_gpu()) {
        return *assumed_gpu();
    }
    static const std::vector<GpuProperties> gpus = query_gpus();
    int device;
    CUDA_CHECK(cudaGetDevice(&device));
    const GpuProperties &gpu = gpus[device], &most = most_gpu_properties();
    return {std::min(gpu.compute_capability, most.compute_capability), std::min(gpu.num_sms, most.num_sms),
            std::min(gpu.shared_bytes_per_sm, most.shared_bytes_per_sm)};
}

// Lets `kernel` have num_bytes of dynamic shared memory a block. Throws Error on a GPU that has less.
template <class Kernel>
inline void allow_dynamic_shared_bytes(Kernel* kernel, int num_bytes) {
    const int most_bytes = gpu_properties().shared_bytes_per_block();
    CHECK(num_bytes <= most_bytes, "a kernel needs %d bytes of shared memory a block, and this GPU has %d", num_bytes,
          most_bytes);
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, num_bytes));
}
