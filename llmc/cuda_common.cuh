// cuda_common.cuh: what every kernel header needs: the storage type, 128-bit access, reductions, error checks, NVTX
// ranges.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include "check.h"
#include "ptx.cuh"

using bf16 = __nv_bfloat16;

constexpr float LOG2_E = 1.4426950408889634f;  // e^x = 2^(x LOG2_E)
constexpr int WARP_SIZE = 32;
constexpr unsigned FULL_WARP = 0xffffffffu;

// ---- errors ------------------------------------------------------------------------------------
// Throws with the statement, the reason and the place.
inline void cuda_check(cudaError_t status, const char* statement, const char* file, int line) {
    CHECK(status == cudaSuccess, "CUDA error: %s (%s) from %s at %s:%d", cudaGetErrorString(status),
          cudaGetErrorName(status), statement, file, line);
}
#define CUDA_CHECK(statement) cuda_check((statement), #statement, __FILE__, __LINE__)

// A function of the driver, found at run time: nothing here links with libcuda. version: of CUDA, whose function of
// that name it is.
template <class Function>
Function driver_function(const char* name, int version) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found));
    CHECK(found == cudaDriverEntryPointSuccess && function != nullptr,
          "the NVIDIA driver has no %s: a driver for CUDA %d.%d or newer is needed", name, version / 1000,
          version % 1000 / 10);
    return reinterpret_cast<Function>(function);
}

// After every launch. `make debug` (LLMC_DEBUG) also waits for the kernel, so that a fault is reported where it
// happened.
inline void cuda_check_launch(const char* function, const char* file, int line) {
    cuda_check(cudaGetLastError(), function, file, line);
#ifdef LLMC_DEBUG
    cuda_check(cudaDeviceSynchronize(), function, file, line);
#endif
}
#define CUDA_CHECK_LAUNCH() cuda_check_launch(__func__, __FILE__, __LINE__)

// ---- profiling ---------------------------------------------------------------------------------
// NVTX range for the enclosing scope, named after the launcher: NVTX_RANGE();
struct NvtxRange {
    explicit NvtxRange(const char* name) { nvtxRangePushA(name); }
    ~NvtxRange() { nvtxRangePop(); }
    NvtxRange(const NvtxRange&) = delete;
    NvtxRange& operator=(const NvtxRange&) = delete;
};
#define NVTX_RANGE() NvtxRange nvtx_range_(__func__)

// ---- 128-bit access ----------------------------------------------------------------------------
// Sixteen bytes of Element, loaded and stored by one instruction. The address must be 16-byte aligned.
template <class Element>
struct alignas(16) Packed128 {
    static constexpr int size = 16 / sizeof(Element);
    Element data[size];

    __device__ Element& operator[](int i) { return data[i]; }
    __device__ const Element& operator[](int i) const { return data[i]; }
};
using bf16x8 = Packed128<bf16>;
using float4x = Packed128<float>;

template <class Element>
__device__ inline Packed128<Element> load128(const Element* address) {
    Packed128<Element> packed;
    *reinterpret_cast<int4*>(packed.data) = *reinterpret_cast<const int4*>(address);
    return packed;
}
// To global memory only. In assembly because nvcc (13.0) splits a plain store into four of 4 bytes where the address is
// a sum of several products, as rows of a HeadView are.
template <class Element>
__device__ inline void store128(Element* address, const Packed128<Element>& packed) {
    const int4 bits = *reinterpret_cast<const int4*>(packed.data);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(bits.x),
                 "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
}
// In shared memory, by its address there.
__device__ __forceinline__ bf16x8 load128_shared(uint32_t address) {
    bf16x8 packed;
    *reinterpret_cast<int4*>(packed.data) = load_shared_b128(address);
    return packed;
}
__device__ __forceinline__ void store128_shared(uint32_t address, const bf16x8& packed) {
    store_shared_b128(address, *reinterpret_cast<const int4*>(packed.data));
}
// Streaming forms: for data not read again soon.
template <class Element>
__device__ inline Packed128<Element> load128_streaming(const Element* address) {
    Packed128<Element> packed;
    *reinterpret_cast<int4*>(packed.data) = __ldcs(reinterpret_cast<const int4*>(address));
    return packed;
}
template <class Element>
__device__ inline void store128_streaming(Element* address, const Packed128<Element>& packed) {
    __stcs(reinterpret_cast<int4*>(address), *reinterpret_cast<const int4*>(packed.data));
}

// ---- reductions --------------------------------------------------------------------------------
// The sum and the maximum over the warp, in every lane; the order of additions is fixed.
__device__ inline float warp_sum(float value) {
#pragma unroll
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(FULL_WARP, value, offset);
    }
    return value;
}
__device__ inline float warp_max(float value) {
#pragma unroll
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
        value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, offset));
    }
    return value;
}
// The sum over a block of at most 1024 threads, a multiple of 32; valid in thread 0. The order of additions is fixed.
__device__ inline double block_sum_double(double value) {
    __shared__ double warp_sums[WARP_SIZE];
#pragma unroll
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(FULL_WARP, value, offset);
    }
    __syncthreads();  // thread 0 has read an earlier call's
    if (threadIdx.x % WARP_SIZE == 0) {
        warp_sums[threadIdx.x / WARP_SIZE] = value;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < (int)blockDim.x / WARP_SIZE; ++warp) {
            value += warp_sums[warp];
        }
    }
    return value;
}
