// flash_attention.cuh: softmax attention, forward and backward: which kernels run where.
//   sm_90a (compute capability 9.0 exactly), D = 64 and 128: flash_attention_hopper_forward.cuh,
//   flash_attention_hopper_backward.cuh, for views that TMA can read and write (tma_can_map: strides positive and below
//   2^40 bytes; the backward refuses others);
//   all else, sm_80 and up, any D that is a multiple of 8 up to 256, the forward of other views too:
//   flash_attention_mma_forward.cuh, flash_attention_mma_backward.cuh.
// Both take the same operands, keep the same conventions (lse natural, a row that sees no key: out 0, lse -infinity,
// gradient 0) and may be mixed: the forward of one with the backward of the other.
#pragma once
#include "flash_attention_mma_backward.cuh"
#include "flash_attention_mma_forward.cuh"
#include "gpu_properties.cuh"
#ifdef LLMC_HOPPER
#include "flash_attention_hopper.cuh"
#endif

// Whether the current device and the shape are ones the Hopper kernels were written for.
inline bool flash_attention_is_hopper(const AttentionShape& shape) {
    return gpu_properties().compute_capability == 90 && (shape.D == 64 || shape.D == 128);
}

// out (=), lse (=) float32 [B, H, Tq], the natural log-sum-exp of the scaled scores. Repeats bit for bit.
inline void flash_attention_forward(HeadView<bf16> out, float* lse, HeadView<const bf16> q, HeadView<const bf16> k,
                                    HeadView<const bf16> v, const AttentionShape& shape, cudaStream_t stream) {
#ifdef LLMC_HOPPER
    if (flash_attention_is_hopper(shape) && flash_attention_hopper_forward_takes(out, q, k, v, shape)) {
        return flash_attention_hopper_forward(out, lse, q, k, v, shape, stream);
    }
#endif
    flash_attention_mma_forward(out, lse, q, k, v, shape, stream);
}

// What flash_attention_backward needs on the current device; turns_back: when it gets a rotation.
inline size_t flash_attention_backward_scratch_bytes(const AttentionShape& shape, bool deterministic,
                                                     [[maybe_unused]] bool turns_back = false) {
#ifdef LLMC_HOPPER
    if (flash_attention_is_hopper(shape)) {
        return flash_attention_hopper_backward_scratch_bytes(shape, deterministic, turns_back);
    }
#endif
    return flash_attention_mma_backward_scratch_bytes(shape, deterministic);
}

// dq, dk, dv (=) from dout and the forward's operands, out and lse; dk and dv are bf16 or float32 views. deterministic:
// all three repeat bit for bit; otherwise dq, and with long groups of heads dk and dv, are summed in an order that
// varies. scratch need not be zero. rotation: q and k are packed rows of the same positions that rope_forward has
// turned, so are dq and dk, and these come out turned back, by kernels that write them where these can, else by
// rope_backward.
inline void flash_attention_backward(HeadView<bf16> dq, KeyGradientView dk, KeyGradientView dv,
                                     HeadView<const bf16> dout, HeadView<const bf16> q, HeadView<const bf16> k,
                                     HeadView<const bf16> v, HeadView<const bf16> out, const float* lse, void* scratch,
                                     const AttentionShape& shape, bool deterministic, cudaStream_t stream,
                                     const RopeRotation* rotation = nullptr) {
    CHECK(rotation == nullptr ||
              (shape.Tq == shape.Tk && rotation->positions.T == shape.Tq && dk.rounded.data == dq.row(0, 0, shape.H) &&
               dq.stride_h == shape.D && dk.rounded.stride_h == shape.D && dq.stride_t == dk.rounded.stride_t &&
               (shape.B == 1 || (dq.stride_b == shape.Tq * dq.stride_t && dk.rounded.stride_b == dq.stride_b))),
          "attention: dq and dk that are turned back must be heads of packed bf16 rows of the same positions");
#ifdef LLMC_HOPPER
    if (flash_attention_is_hopper(shape)) {
        const bool fused = rotation != nullptr && rope_table_fits(rotation->positions);
        flash_attention_hopper_backward(dq, dk, dv, dout, q, k, v, out, lse, scratch, shape, deterministic, stream,
                                        fused ? rotation : nullptr);
        if (fused) {
            return;
        }
    } else
#endif
    {
        flash_attention_mma_backward(dq, dk, dv, dout, q, k, v, out, lse, scratch, shape, deterministic, stream);
    }
    if (rotation != nullptr) {
        rope_backward(dq.data, shape.B * shape.Tq, shape.H + shape.Hkv, (int)dq.stride_t, shape.D,
                      rotation->frequencies, rotation->positions, stream);
    }
}
