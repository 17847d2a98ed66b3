// ptx_hopper.cuh: the PTX instructions that only the kernels for sm_90a use, each once, under a name: mbarriers, TMA
// copies and their tensor maps, clusters, wgmma, stmatrix, named barriers, setmaxnreg. The PTX ISA 9.7 sections are
// named beside them.
//
// Tiles in shared memory. All operands of wgmma and TMA here use the 128-byte swizzle: a tile of R rows and C columns
// of bf16 is C / 64 blocks, one after the other, of R rows of 64 columns (128 bytes); within a row the 16-byte chunk at
// position c lies at c ^ (row % 8). Every block starts at a multiple of 1024 bytes, so R is a multiple of 8 and the
// swizzle is a function of the address: bits 4-6 ^= bits 7-9. TMA, wgmma, stmatrix and ordinary code agree on that.
//
// Fragments of a warpgroup (4 warps; w = warp % 4, g = lane / 4, t = lane % 4):
//   D [64 x N] float32  d[i] = row 16 w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2 t + i % 2
//   A [64 x 16] bf16    a[0] = (g, 2t..2t+1)  a[1] = (g+8, 2t..)  a[2] = (g, 2t+8..)  a[3] = (g+8, 2t+8..), rows + 16 w
// so registers 8 k .. 8 k + 7 of D, rounded and packed in pairs, are A of contraction step k.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>

#include <algorithm>

#include "attention_shape.cuh"
#include "ptx.cuh"

constexpr int WARPGROUP_SIZE = 128;

// ---- tensor maps (host) ------------------------------------------------------------------------
// Whether TMA can read or write a view of [B, T, heads, D]: 16-byte aligned, strides positive multiples of 16 bytes
// below 2^40 bytes where the extent exceeds 1.
template <class Element>
inline bool tma_can_map(const HeadView<Element>& view, int64_t B, int64_t T, int64_t heads) {
    auto fits = [](int64_t stride, int64_t extent) {
        const int64_t num_bytes = stride * (int64_t)sizeof(Element);
        return extent == 1 || (num_bytes > 0 && num_bytes % 16 == 0 && num_bytes < (int64_t)1 << 40);
    };
    return (uintptr_t)view.data % 16 == 0 && fits(view.stride_b, B) && fits(view.stride_t, T) &&
           fits(view.stride_h, heads);
}

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static const auto encoder = driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled", 12000);
    return encoder;
}

constexpr cuuint32_t TILE_BLOCK_COLUMNS = 64;

// cuTensorMapEncodeTiled's status: map (=) of a bf16 tensor whose innermost dimension is contiguous, to move boxes of
// TILE_BLOCK_COLUMNS of it to or from tiles as described above. strides: bytes, of the other dimensions.
template <int RANK>
inline CUresult encode_tensor_map(CUtensorMap& map, const bf16* data, const cuuint64_t (&extents)[RANK],
                                  const cuuint64_t (&strides)[RANK - 1], const cuuint32_t (&box)[RANK]) {
    cuuint32_t element_strides[RANK];
    std::fill(element_strides, element_strides + RANK, 1);
    return tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, RANK, const_cast<bf16*>(data), extents, strides,
                                box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}
// The map of a bf16 view of [B, T, heads, D], D a multiple of 64, whose copies move box_rows (at most 256) consecutive
// rows of one head between memory and a tile as described above. Rows outside [0, T) read as zeros, which count as
// bytes moved, and are not written.
template <class Element>
inline CUtensorMap head_tensor_map(const HeadView<Element>& view, int64_t B, int64_t T, int64_t heads, int D,
                                   int box_rows) {
    static_assert(std::is_same_v<std::remove_const_t<Element>, bf16>, "tiles are bf16");
    auto stride_bytes = [](int64_t stride, int64_t extent) {
        return (cuuint64_t)(extent == 1 ? 16 : stride * (int64_t)sizeof(Element));  // any valid one where none is taken
    };
    const cuuint64_t extents[5] = {TILE_BLOCK_COLUMNS, (cuuint64_t)T, (cuuint64_t)D / TILE_BLOCK_COLUMNS,
                                   (cuuint64_t)heads, (cuuint64_t)B};
    const cuuint64_t strides[4] = {stride_bytes(view.stride_t, T), TILE_BLOCK_COLUMNS * sizeof(Element),
                                   stride_bytes(view.stride_h, heads), stride_bytes(view.stride_b, B)};
    const cuuint32_t box[5] = {TILE_BLOCK_COLUMNS, (cuuint32_t)box_rows, (cuuint32_t)D / TILE_BLOCK_COLUMNS, 1, 1};
    CUtensorMap map;
    const CUresult status = encode_tensor_map(map, view.data, extents, strides, box);
    CHECK(status == CUDA_SUCCESS,
          "cuTensorMapEncodeTiled refuses [B %lld, T %lld, heads %lld, D %d] with strides %lld, %lld, %lld at %p "
          "(CUresult %d)",
          (long long)B, (long long)T, (long long)heads, D, (long long)view.stride_b, (long long)view.stride_t,
          (long long)view.stride_h, (const void*)view.data, (int)status);
    return map;
}

// The map of a row-major bf16 matrix [rows, columns] whose rows lie row_stride elements apart (a multiple of 8; data
// aligned to 16 bytes): its copies move box_rows (at most 256) rows of 64 columns, one block of a tile as described
// above. What lies outside reads as zeros, which count as bytes moved, and is not written.
inline CUtensorMap matrix_tensor_map(const bf16* data, int64_t rows, int64_t columns, int64_t row_stride,
                                     int box_rows) {
    const cuuint64_t extents[2] = {(cuuint64_t)columns, (cuuint64_t)rows};
    const cuuint64_t strides[1] = {(cuuint64_t)row_stride * sizeof(bf16)};
    const cuuint32_t box[2] = {TILE_BLOCK_COLUMNS, (cuuint32_t)box_rows};
    CUtensorMap map;
    const CUresult status = encode_tensor_map(map, data, extents, strides, box);
    CHECK(status == CUDA_SUCCESS,
          "cuTensorMapEncodeTiled refuses a matrix of %lld x %lld with rows %lld elements apart at %p (CUresult %d)",
          (long long)rows, (long long)columns, (long long)row_stride, (const void*)data, (int)status);
    return map;
}

// ---- kernels that follow each other (griddepcontrol) -------------------------------------------
// In a kernel launched with cudaLaunchAttributeProgrammaticStreamSerialization, before it touches what the kernel
// before wrote: waits until that one is over and its writes are visible. Elsewhere nothing.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Such a kernel may start once all blocks of this one have said so, or are over.
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)  // device code below: sm_90a alone

// ---- mbarriers (9.7.13.15) ---------------------------------------------------------------------
// A barrier in shared memory that completes a phase when `arrivals` arrivals and all expected bytes have come. Waiting
// names the parity of the phase waited for: 0 the first, 1 the second, 0 the third; a wait for parity 1 on a fresh
// barrier returns at once.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After mbarrier_init and before the barrier after which others, TMA among them, use the mbarriers.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and says how many bytes the phase's copies bring.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes) : "memory");
}
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}
// With LLMC_WATCHDOG or LLMC_DEBUG a wait of more than 2^31 clocks, about a second, ends the kernel with a store to
// address 0: a deadlock becomes an error. (With a trap ptxas no longer counts on setmaxnreg, spills the accumulators
// and serialises every wgmma.)
#if defined(LLMC_WATCHDOG) || defined(LLMC_DEBUG)
struct Watchdog {
    uint32_t begin = (uint32_t)clock();
    __device__ __forceinline__ void check() const {
        if ((uint32_t)clock() - begin > 1u << 31) {
            asm volatile("st.global.u32 [%0], 0;" ::"l"(0ull) : "memory");
        }
    }
};
#else
struct Watchdog {
    __device__ __forceinline__ void check() const {}
};
#endif
// Waits for the phase of that parity.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    if (mbarrier_try_wait(barrier, parity)) {
        return;
    }
    const Watchdog watchdog{};
    while (!mbarrier_try_wait(barrier, parity)) {
        watchdog.check();
    }
}
// Where a ring of `stages` buffers stands; the parity flips each time round.
template <int stages>
struct PipelineState {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// ---- clusters (9.7.13.4, 9.7.9.24) ---------------------------------------------------------------
// This block's place in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// All threads of all blocks of the cluster. Before a block touches another's shared memory, and before one leaves that
// others may still touch.
__device__ __forceinline__ void cluster_sync() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
}
// Arrives on the mbarrier at the same place in the shared memory of the cluster's block `rank`.
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// ---- named barriers (9.7.13.1) -----------------------------------------------------------------
// id 1 to 15 (0 is __syncthreads), threads a multiple of 32 that counts those that wait and those that only arrive.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- TMA (9.7.9.25, 9.7.9.27) ------------------------------------------------------------------
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Starts reading the box at row t of head h of sequence b into `shared`; completes on the mbarrier, for all of the
// box's bytes even where rows lie outside the tensor. One thread.
__device__ __forceinline__ void tma_load(uint32_t shared, const CUtensorMap* map, int t, int h, int b,
                                         uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %2, %4, %5}], "
        "[%6];" ::"r"(shared),
        "l"(map), "r"(0), "r"(t), "r"(h), "r"(b), "r"(barrier)
        : "memory");
}
// The same with an L2 policy from l2_policy_*.
__device__ __forceinline__ void tma_load(uint32_t shared, const CUtensorMap* map, int t, int h, int b, uint32_t barrier,
                                         uint64_t l2_policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
        "[%1, {%2, %3, %2, %4, %5}], [%6], %7;" ::"r"(shared),
        "l"(map), "r"(0), "r"(t), "r"(h), "r"(b), "r"(barrier), "l"(l2_policy)
        : "memory");
}
// Starts writing a tile to the box at row t of head h of sequence b; rows outside the tensor are left out. One thread,
// after fence_async_shared by the threads that wrote the tile and a barrier; bulk_commit closes the group.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t shared, int t, int h, int b) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%1, %2, %1, %3, %4}], [%5];" ::"l"(map),
                 "r"(0), "r"(t), "r"(h), "r"(b), "r"(shared)
                 : "memory");
}
// A map of matrix_tensor_map: starts reading the box at (row, column); completes on the mbarrier for all of its bytes.
// One thread.
__device__ __forceinline__ void tma_load_block(uint32_t shared, const CUtensorMap* map, int row, int column,
                                               uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
// The same to this place in the shared memory of every block of the cluster whose bit is set, each of which sees the
// bytes complete on its own mbarrier.
__device__ __forceinline__ void tma_load_block_multicast(uint32_t shared, const CUtensorMap* map, int row, int column,
                                                         uint32_t barrier, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(shared),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
        : "memory");
}
// Starts writing a block to the box at (row, column), as tma_store.
__device__ __forceinline__ void tma_store_block(const CUtensorMap* map, uint32_t shared, int row, int column) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
                 "r"(row), "r"(shared)
                 : "memory");
}
// Starts copying num_bytes (a multiple of 16, both addresses too) of global memory to shared memory.
__device__ __forceinline__ void bulk_load(uint32_t shared, const void* global, uint32_t num_bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(global), "r"(num_bytes), "r"(barrier)
        : "memory");
}
// Starts copying num_bytes (a multiple of 16, both addresses too) of shared memory to global memory.
__device__ __forceinline__ void bulk_store(void* global, uint32_t shared, uint32_t num_bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared),
                 "r"(num_bytes)
                 : "memory");
}
// Starts adding num_bytes (a multiple of 16) of float32 in shared memory to global memory, each element atomically.
__device__ __forceinline__ void bulk_reduce_add_f32(float* global, uint32_t shared, uint32_t num_bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
                 "r"(shared), "r"(num_bytes)
                 : "memory");
}
// Closes the group of this thread's stores and reductions since the last commit.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's latest groups still read their shared memory.
template <int pending>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
// Waits until at most `pending` of this thread's latest groups are unfinished: the others' results are in memory.
template <int pending>
__device__ __forceinline__ void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}
// Makes this thread's ordinary writes to shared memory (stmatrix too) visible to TMA and wgmma. By every thread that
// wrote, before the barrier after which they read.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Orders this thread's accesses of global memory by TMA and bulk copies with its ordinary ones.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// A count in global memory that blocks wait on: what a thread did before add_release is seen by those that read the new
// value by load_acquire or wait_for_count.
__device__ __forceinline__ void add_release(int* count, int value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(count), "r"(value) : "memory");
}
__device__ __forceinline__ int load_acquire(const int* count) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
    return value;
}
__device__ __forceinline__ void wait_for_count(const int* count, int value) {
    const Watchdog watchdog{};
    for (; load_acquire(count) != value; watchdog.check()) {
    }
}

// How long what is loaded should stay in the L2 cache.
__device__ __forceinline__ uint64_t l2_policy_evict_first() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// ---- registers (9.7.19.5) ----------------------------------------------------------------------
// The warpgroup keeps, or waits for, `registers` a thread: a multiple of 8 from 24 to 256. All its warps together.
template <int registers>
__device__ __forceinline__ void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// ---- stmatrix (9.7.14.5.16) --------------------------------------------------------------------
// Four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned);
// fragment[i] is this lane's pair of matrix i: row l / 4, columns 2 (l % 4) and the next.
__device__ __forceinline__ void stmatrix_x4(uint32_t shared, const uint32_t (&fragment)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(fragment[0]),
                 "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
                 : "memory");
}
// The same with each matrix transposed: the pair is rows 2 (l % 4) and the next of column l / 4.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t shared, const uint32_t (&fragment)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
                 "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
                 : "memory");
}

// Where the 16 bytes lie whose address this lane gives to ldmatrix or stmatrix, of a warpgroup's 64 rows of a tile as
// described above, beginning at `rows`: of its warp's 16 rows, columns 16 group to 16 group + 15, the matrices of a
// fragment of A. TILE_ROWS: of the whole tile.
template <int TILE_ROWS = 64>
__device__ __forceinline__ uint32_t fragment_address(uint32_t rows, int group) {
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE % 4;
    const int row = 16 * warp + lane % 16, chunk = 2 * (group % 4) + lane / 16;
    return rows + group / 4 * (TILE_ROWS * 128) + row * 128 + (chunk ^ (row % 8)) * 16;
}

// ---- wgmma (9.7.15) ----------------------------------------------------------------------------
// Matrix descriptors of a tile as described above. K-major: the contraction runs along the columns; the next 16 of it
// are 32 bytes on, the next block of 64 columns one block. The operand's rows 64 further: 8192 bytes on.
constexpr uint64_t WGMMA_SWIZZLE_128B = (uint64_t)1 << 62;
__device__ __forceinline__ uint64_t wgmma_descriptor_k_major(uint32_t shared) {
    constexpr uint64_t EIGHT_ROWS = 1024 / 16;
    return WGMMA_SWIZZLE_128B | EIGHT_ROWS << 32 | (uint64_t)1 << 16 | (uint64_t)((shared & 0x3ffff) >> 4);
}
// MN-major (trans 1): the contraction runs along the rows; the next 16 of it are 2048 bytes on. block_bytes: from one
// block of 64 columns to the next, rows * 128.
__device__ __forceinline__ uint64_t wgmma_descriptor_mn_major(uint32_t shared, uint32_t block_bytes) {
    constexpr uint64_t EIGHT_ROWS = 1024 / 16;
    return WGMMA_SWIZZLE_128B | EIGHT_ROWS << 32 | (uint64_t)(block_bytes >> 4) << 16 |
           (uint64_t)((shared & 0x3ffff) >> 4);
}
// K-major, of rows of 8 columns, 16 bytes one after another, unswizzled. A step takes 16 columns: 8 to 15 are 0 to 7
// once more, no bytes further on.
__device__ __forceinline__ uint64_t wgmma_descriptor_8_columns(uint32_t shared) {
    constexpr uint64_t EIGHT_ROWS = 128 / 16;
    return EIGHT_ROWS << 32 | (uint64_t)((shared & 0x3ffff) >> 4);
}
// The descriptor num_bytes further on.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t descriptor, uint32_t num_bytes) {
    return descriptor + (num_bytes >> 4);
}

// Before the first wgmma of a batch, and whenever ordinary code wrote its accumulators or its A registers since.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `pending` of the latest groups are unfinished. Pin the accumulators that are ready with
// wgmma_pin before ordinary code reads them.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving reads or writes of these registers across this point.
template <int count>
__device__ __forceinline__ void wgmma_pin(float (&registers)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
        asm volatile("" : "+f"(registers[i])::"memory");
    }
}

// wgmma<TRANS_A, TRANS_B>(d, a, b): d += A B, one step of 16 of the contraction, issued by a whole warpgroup, running
// on until a wait. d: float[N / 2], whose size selects m64nNk16. a, b: descriptors, or a: uint32_t[4], then
// wgmma<TRANS_B>. wgmma_zero: d = A B, the first step of a product; d's old values are not read, so it may be issued
// while groups on other accumulators run. wgmma_anew, of descriptors: the same in the registers that d's old values
// have, which must not be needed any more; ptxas plans others beside them for wgmma_zero, and serialises every wgmma
// when those are too many.
#define WGMMA_REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_REGISTERS_1 WGMMA_REGISTERS_0 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_REGISTERS_2 WGMMA_REGISTERS_1 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_REGISTERS_3 WGMMA_REGISTERS_2 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_REGISTERS_4 WGMMA_REGISTERS_3 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_REGISTERS_5 WGMMA_REGISTERS_4 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_REGISTERS_6 WGMMA_REGISTERS_5 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_REGISTERS_7 WGMMA_REGISTERS_6 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_REGISTERS_8 WGMMA_REGISTERS_7 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_REGISTERS_9 WGMMA_REGISTERS_8 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_REGISTERS_10 WGMMA_REGISTERS_9 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_REGISTERS_11 WGMMA_REGISTERS_10 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_REGISTERS_12 WGMMA_REGISTERS_11 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_REGISTERS_13 WGMMA_REGISTERS_12 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_REGISTERS_14 WGMMA_REGISTERS_13 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_REGISTERS_15 WGMMA_REGISTERS_14 ", %120, %121, %122, %123, %124, %125, %126, %127"
// Operands: MODE "+f" or "=f".
#define WGMMA_EIGHT(MODE, d, i)                                                                                 \
    MODE(d[i]), MODE(d[i + 1]), MODE(d[i + 2]), MODE(d[i + 3]), MODE(d[i + 4]), MODE(d[i + 5]), MODE(d[i + 6]), \
        MODE(d[i + 7])
#define WGMMA_OUT_2(MODE, d) WGMMA_EIGHT(MODE, d, 0), WGMMA_EIGHT(MODE, d, 8), WGMMA_EIGHT(MODE, d, 16)
#define WGMMA_OUT_3(MODE, d) WGMMA_OUT_2(MODE, d), WGMMA_EIGHT(MODE, d, 24)
#define WGMMA_OUT_4(MODE, d) WGMMA_OUT_3(MODE, d), WGMMA_EIGHT(MODE, d, 32)
#define WGMMA_OUT_5(MODE, d) WGMMA_OUT_4(MODE, d), WGMMA_EIGHT(MODE, d, 40)
#define WGMMA_OUT_6(MODE, d) WGMMA_OUT_5(MODE, d), WGMMA_EIGHT(MODE, d, 48)
#define WGMMA_OUT_7(MODE, d) WGMMA_OUT_6(MODE, d), WGMMA_EIGHT(MODE, d, 56)
#define WGMMA_OUT_8(MODE, d) WGMMA_OUT_7(MODE, d), WGMMA_EIGHT(MODE, d, 64)
#define WGMMA_OUT_9(MODE, d) WGMMA_OUT_8(MODE, d), WGMMA_EIGHT(MODE, d, 72)
#define WGMMA_OUT_10(MODE, d) WGMMA_OUT_9(MODE, d), WGMMA_EIGHT(MODE, d, 80)
#define WGMMA_OUT_11(MODE, d) WGMMA_OUT_10(MODE, d), WGMMA_EIGHT(MODE, d, 88)
#define WGMMA_OUT_12(MODE, d) WGMMA_OUT_11(MODE, d), WGMMA_EIGHT(MODE, d, 96)
#define WGMMA_OUT_13(MODE, d) WGMMA_OUT_12(MODE, d), WGMMA_EIGHT(MODE, d, 104)
#define WGMMA_OUT_14(MODE, d) WGMMA_OUT_13(MODE, d), WGMMA_EIGHT(MODE, d, 112)
#define WGMMA_OUT_15(MODE, d) WGMMA_OUT_14(MODE, d), WGMMA_EIGHT(MODE, d, 120)
#define WGMMA_ADD(register) "+f"(register)
#define WGMMA_SET(register) "=f"(register)

// One width: N, its last group of eight registers, and the numbers of the operands behind the accumulators.
#define WGMMA_FUNCTIONS_SS(NAME, N, LAST, MODE, SCALE_D, A, B, TA, TB)                                   \
    template <int TRANS_A, int TRANS_B>                                                                  \
    __device__ __forceinline__ void NAME(float(&d)[N / 2], uint64_t a, uint64_t b) {                     \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " SCALE_D                                     \
                     ", 0;\n"                                                                            \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_REGISTERS_##LAST \
                     "}, " A ", " B ", add, 1, 1, " TA ", " TB ";\n}"                                    \
                     : WGMMA_OUT_##LAST(MODE, d)                                                         \
                     : "l"(a), "l"(b), "n"(TRANS_A), "n"(TRANS_B));                                      \
    }
#define WGMMA_FUNCTIONS_RS(NAME, N, LAST, MODE, SCALE_D, A0, A1, A2, A3, B, TB)                          \
    template <int TRANS_B>                                                                               \
    __device__ __forceinline__ void NAME(float(&d)[N / 2], const uint32_t(&a)[4], uint64_t b) {          \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " SCALE_D                                     \
                     ", 0;\n"                                                                            \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_REGISTERS_##LAST \
                     "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", add, 1, 1, " TB ";\n}"                 \
                     : WGMMA_OUT_##LAST(MODE, d)                                                         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(TRANS_B));                \
    }
#define WGMMA_FUNCTIONS(N, LAST, P0, P1, P2, P3, P4, P5)                       \
    WGMMA_FUNCTIONS_SS(wgmma, N, LAST, WGMMA_ADD, "1", P0, P1, P2, P3)         \
    WGMMA_FUNCTIONS_SS(wgmma_zero, N, LAST, WGMMA_SET, "0", P0, P1, P2, P3)    \
    WGMMA_FUNCTIONS_SS(wgmma_anew, N, LAST, WGMMA_ADD, "0", P0, P1, P2, P3)    \
    WGMMA_FUNCTIONS_RS(wgmma, N, LAST, WGMMA_ADD, "1", P0, P1, P2, P3, P4, P5) \
    WGMMA_FUNCTIONS_RS(wgmma_zero, N, LAST, WGMMA_SET, "0", P0, P1, P2, P3, P4, P5)
WGMMA_FUNCTIONS(48, 2, "%24", "%25", "%26", "%27", "%28", "%29")
WGMMA_FUNCTIONS(64, 3, "%32", "%33", "%34", "%35", "%36", "%37")
WGMMA_FUNCTIONS(80, 4, "%40", "%41", "%42", "%43", "%44", "%45")
WGMMA_FUNCTIONS(128, 7, "%64", "%65", "%66", "%67", "%68", "%69")
WGMMA_FUNCTIONS(144, 8, "%72", "%73", "%74", "%75", "%76", "%77")
WGMMA_FUNCTIONS(160, 9, "%80", "%81", "%82", "%83", "%84", "%85")
WGMMA_FUNCTIONS(192, 11, "%96", "%97", "%98", "%99", "%100", "%101")
WGMMA_FUNCTIONS(256, 15, "%128", "%129", "%130", "%131", "%132", "%133")

// An accumulator, rounded, as the A operand of a product that contracts its columns.
template <int COUNT>
__device__ __forceinline__ void round_to_operand(uint32_t (&operand)[COUNT / 8][4], const float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
        operand[i / 4][i % 4] = pack_bf16x2(values[2 * i], values[2 * i + 1]);
    }
}

#endif  // sm_90a
