// fused_gemm.cuh: the products of a block with what follows them, in one call:
//   qkv product and rotation     qkv [M, N] = rope(in [M, K] weight [N, K]^T)
//   gate and up product and gate gate_up [M, 2F] = in [M, K] weight [2F, K]^T, swiglu [M, F] of it
//   input of the down product    dswiglu = dout [M, K] weight [K, F], dgate_up [M, 2F] and swiglu [M, F] of it
// Which kernels run: on sm_90a one (gemm_hopper.cuh), for the rotation where D is 64 or 128 and rows come in whole
// groups of 64 positions; elsewhere cuBLASLt (gemm.cuh), then rope.cuh or swiglu.cuh. The choice depends on the
// GPU, the shape and whether operands are aligned to 16 bytes. Either way what follows works on the rounded product.
#pragma once
#include "gemm.cuh"
#include "gpu_properties.cuh"
#include "rope.cuh"
#include "swiglu.cuh"
#ifdef LLMC_HOPPER
#include "gemm_hopper.cuh"
#endif

// The rotation of a product's first num_rotated_heads heads of D.
struct ProductRotation {
    int D, num_rotated_heads;
    const RopeRotation& rotation;
};

#ifdef LLMC_HOPPER
inline bool fused_gemm_is_hopper(const bf16* out, const bf16* in, const bf16* weight, int64_t M, int64_t N, int64_t K) {
    return gpu_properties().compute_capability == 90 && gemm_hopper_takes(in, weight, out, M, N, K);
}
#endif

// qkv (=) [M, N] = in [M, K] weight [N, K]^T, turned forward. M a multiple of T of the positions; N and K of 8.
inline void rotated_product(bf16* qkv, const bf16* in, const bf16* weight, const ProductRotation& rotated, int64_t M,
                            int64_t N, int64_t K, Gemm& gemm, cudaStream_t stream) {
    const RopePositions& p = rotated.rotation.positions;
#ifdef LLMC_HOPPER
    if (fused_gemm_is_hopper(qkv, in, weight, M, N, K) && (rotated.D == 64 || rotated.D == 128) && p.T % 64 == 0 &&
        p.run_rows % 64 == 0) {
        return gemm_hopper_rotated(qkv, in, weight, M, N, K, rotated.D, rotated.num_rotated_heads, rotated.rotation,
                                   stream);
    }
#endif
    gemm.forward(qkv, in, weight, nullptr, M, N, K, stream);
    rope_forward(qkv, M, rotated.num_rotated_heads, (int)N, rotated.D, rotated.rotation.frequencies, p, stream);
}

// gate_up (=) [M, 2F] = in [M, K] weight [2F, K]^T and swiglu (=) [M, F] of it. F and K multiples of 8.
inline void gated_product(bf16* gate_up, bf16* swiglu, const bf16* in, const bf16* weight, int64_t M, int64_t F,
                          int64_t K, Gemm& gemm, cudaStream_t stream) {
#ifdef LLMC_HOPPER
    if (fused_gemm_is_hopper(gate_up, in, weight, M, 2 * F, K)) {
        return gemm_hopper_swiglu(gate_up, swiglu, in, weight, M, F, K, stream);
    }
#endif
    gemm.forward(gate_up, in, weight, nullptr, M, 2 * F, K, stream);
    swiglu_forward(swiglu, gate_up, M, (int)F, stream);
}

// dgate_up (=) [M, 2F]: swiglu_backward of gate_up [M, 2F] and of dswiglu = dout [M, K] weight [K, F]. dgate_up may be
// gate_up. scratch: [M, F]; with wants_swiglu what gated_product gave is left there. F and K multiples of 8.
inline void gated_product_backward(bf16* dgate_up, bf16* scratch, bool wants_swiglu, const bf16* dout,
                                   const bf16* weight, const bf16* gate_up, int64_t M, int64_t F, int64_t K, Gemm& gemm,
                                   cudaStream_t stream) {
    bf16* const swiglu = wants_swiglu ? scratch : nullptr;
#ifdef LLMC_HOPPER
    if (fused_gemm_is_hopper(scratch, dout, weight, M, 2 * F, K) && F <= GEMM_HOPPER_WIDEST_GATE) {
        return gemm_hopper_swiglu_backward(dgate_up, swiglu, dout, weight, gate_up, M, F, K, stream);
    }
#endif
    gemm.backward_input(scratch, dout, weight, M, K, F, stream);
    swiglu_backward(dgate_up, swiglu, scratch, gate_up, M, (int)F, stream);
}
