// gpu_properties.cuh: the properties of a GPU that choose kernels and sizes of scratch memory: of the current device
// or, in a process that only plans and has none (--fit), of the GPU that is planned for.
#pragma once
#include <optional>

#include "cuda_common.cuh"

struct GpuProperties {
    int compute_capability = 0;  // 90 for 9.0
    int num_sms = 0;
    int shared_bytes_per_sm = 0;  // that the blocks on a multiprocessor share
};

constexpr GpuProperties H100_PROPERTIES{90, 132, 228 * 1024};
// What the driver takes of it for each block, on every GPU from sm_80 on.
constexpr int RESERVED_SHARED_BYTES_PER_BLOCK = 1024;

// Unset wherever kernels are launched.
inline std::optional<GpuProperties>& assumed_gpu() {
    static std::optional<GpuProperties> properties;
    return properties;
}

inline GpuProperties gpu_properties() {
    if (assumed_gpu()) {
        return *assumed_gpu();
    }
    int device, major, minor;
    GpuProperties properties;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&properties.num_sms, cudaDevAttrMultiProcessorCount, device));
    CUDA_CHECK(
        cudaDeviceGetAttribute(&properties.shared_bytes_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    properties.compute_capability = 10 * major + minor;
    return properties;
}
