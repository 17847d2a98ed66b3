// gemm_cases.cuh: what the programs of matrix products share: the naive product, and cuBLASLt with a workspace.
#pragma once
#include "dev/cuda/harness.cuh"
#include "llmc/gemm.cuh"

// result [rows, cols] = sum over `depth` of a and b at these strides, plus itself with `accumulate`. Launch: one thread
// an element of the result.
template <class Element>
__global__ void naive_gemm_kernel(Element* out, const bf16* a, const bf16* b, int64_t rows, int64_t cols, int64_t depth,
                                  int64_t a_row, int64_t a_depth, int64_t b_col, int64_t b_depth, bool accumulate) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < rows * cols) {
        float sum = accumulate ? (float)out[i] : 0.0f;
        for (int64_t d = 0; d < depth; ++d) {
            sum += (float)a[i / cols * a_row + d * a_depth] * (float)b[i % cols * b_col + d * b_depth];
        }
        out[i] = (Element)sum;
    }
}
// The three products of a linear layer, as Gemm's.
inline void naive_gemm(GemmOperation operation, void* out, const bf16* a, const bf16* b, int64_t M, int64_t N,
                       int64_t K, bool accumulate, cudaStream_t stream) {
    switch (operation) {
        case GemmOperation::forward:
            naive_gemm_kernel<<<ceil_div<int64_t>(M * N, 256), 256, 0, stream>>>((bf16*)out, a, b, M, N, K, K, 1, K, 1,
                                                                                 accumulate);
            break;
        case GemmOperation::backward_input:
            naive_gemm_kernel<<<ceil_div<int64_t>(M * K, 256), 256, 0, stream>>>((bf16*)out, a, b, M, K, N, N, 1, 1, K,
                                                                                 accumulate);
            break;
        case GemmOperation::backward_weight:
            naive_gemm_kernel<<<ceil_div<int64_t>(N * K, 256), 256, 0, stream>>>((float*)out, a, b, N, K, M, 1, N, 1, K,
                                                                                 accumulate);
            break;
    }
    CUDA_CHECK_LAUNCH();
}

// cuBLASLt with memory of its own.
class GemmWithWorkspace : private DeviceBuffer<unsigned char>, public Gemm {
  public:
    GemmWithWorkspace()
        : DeviceBuffer<unsigned char>(GEMM_WORKSPACE_BYTES),
          Gemm(DeviceBuffer<unsigned char>::data(), GEMM_WORKSPACE_BYTES) {}
};
