// ptx.cuh: the PTX instructions of sm_80 and up that C++ has no word for, each once, under a name. Those that only
// kernels for Hopper use are in ptx_hopper.cuh. Fragment layouts are in the PTX ISA, "Matrix fragments for mma.m16n8k16"; with g =
// lane / 4 and t = lane % 4:
//   A [16 x 16]  a[0] = (g, 2t..2t+1)  a[1] = (g+8, 2t..)  a[2] = (g, 2t+8..)  a[3] = (g+8, 2t+8..)
//   B [16 x 8]   b0 = (2t..2t+1, g)    b1 = (2t+8.., g)
//   C [16 x 8]   c[0], c[1] = (g, 2t), (g, 2t+1)           c[2], c[3] = (g+8, 2t), (g+8, 2t+1)
// so two neighbouring C tiles, rounded and packed, are one A tile: no data moves between lanes.
#pragma once
#include <cstdint>

// ---- addresses ---------------------------------------------------------------------------------
// The 32-bit address, within the block's shared memory, of a generic pointer to it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

// ---- asynchronous copies, global to shared -----------------------------------------------------
// Copies 16 bytes past the L1 cache; with `valid` false writes 16 zero bytes and does not read. Both addresses are
// multiples of 16.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
// The same for 8 bytes, through the L1 cache.
__device__ __forceinline__ void cp_async_8(uint32_t shared, const void* global, bool valid = true) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(valid ? 8 : 0)
                 : "memory");
}
// Closes the group of this thread's copies issued since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's latest groups are unfinished. Other threads see the data only after a
// barrier.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- shared memory by address -------------------------------------------------------------------
__device__ __forceinline__ void store_shared_b32(uint32_t shared, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}
__device__ __forceinline__ void store_shared_b128(uint32_t shared, int4 value) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}
__device__ __forceinline__ int4 load_shared_b128(uint32_t shared) {
    int4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(shared)
                 : "memory");
    return value;
}

// ---- matrix fragments --------------------------------------------------------------------------
// Four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned);
// fragment[i] is this lane's pair of matrix i: row l / 4, columns 2 (l % 4) and the next.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&fragment)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared)
                 : "memory");
}
// The same with each matrix transposed: the pair is rows 2 (l % 4) and the next of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&fragment)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared)
                 : "memory");
}
// c (+=) a b: [16 x 16] [16 x 8], bf16 in, float32 accumulation.
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Two floats rounded to nearest even and packed, `low` in the low half: in memory it comes first.
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// ---- arithmetic --------------------------------------------------------------------------------
// 2^x to 2 ulp (CUDA C Programming Guide, intrinsics); -infinity gives 0, results below 2^-126 become 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x to 1 ulp; infinity gives 0, results below 2^-126 become 0.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- registers ---------------------------------------------------------------------------------
// The same value, but the compiler cannot know: what is computed from it is computed anew, here, instead of being kept
// in registers since it was computed first.
__device__ __forceinline__ int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// ---- reductions to global memory ---------------------------------------------------------------
// address[0..3] (+=) value, each element atomically, none returned; 16-byte aligned. sm_90 and up.
__device__ __forceinline__ void red_add_f32x4(float* address, float4 value) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(value.x), "f"(value.y),
                 "f"(value.z), "f"(value.w)
                 : "memory");
}
// *address (+=) value, atomically.
__device__ __forceinline__ void red_add_f32(float* address, float value) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}
