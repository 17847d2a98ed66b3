// flash_attention_mma_tiles.cuh: what attention's kernels on mma.sync are made of, forward and backward: tiles in
// shared memory without bank conflicts, copies into and out of them, products of tiles with accumulators in registers,
// and where a block of query rows stands. A product is m16n8k16, bf16 with float32 accumulation; layouts of fragments:
// ptx.cuh. A warp's accumulators are [M_TILES][N_TILES][4], 16 x 8 elements a pair of indices.
#pragma once
#include "flash_attention_launch.cuh"
#include "ptx.cuh"

// ---- tiles in shared memory --------------------------------------------------------------------
// A [rows][COLUMNS] bf16 tile whose 16-byte chunks are permuted within a row so that a column of chunks of eight
// consecutive rows covers all banks: ldmatrix, the copies in and the fragment stores have no conflicts.
template <int COLUMNS>
struct SwizzledTile {
    static_assert(COLUMNS % 16 == 0, "ldmatrix takes 16 columns at a time");
    static constexpr int ROW_BYTES = 2 * COLUMNS;
    static constexpr int PERMUTED = COLUMNS % 64 == 0 ? 8 : COLUMNS % 32 == 0 ? 4 : 2;  // chunks, in aligned groups

    __device__ static int key(int row) { return row / (8 / PERMUTED) % PERMUTED; }
    // Byte offset of a chunk.
    __device__ static uint32_t offset(int row, int chunk) { return row * ROW_BYTES + (chunk ^ key(row)) * 16; }
};

// The addresses one lane gives to ldmatrix for four 8 x 8 matrices of a tile: 16 rows and two chunks. `row` is a
// multiple of 16, `chunk` of 2; when they are constants the address is one register and an immediate.
template <int COLUMNS>
struct FragmentReader {
    using Tile = SwizzledTile<COLUMNS>;
    uint32_t base;

    // tile: aligned to 128 bytes, so that a chunk's number is permuted by flipping bits of the whole address.
    __device__ __forceinline__ FragmentReader(uint32_t tile, int lane_row, int lane_chunk)
        : base(tile + Tile::offset(lane_row, lane_chunk)) {}
    // Matrices in the order (rows 0-7, chunk 0), (rows 8-15, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 1): A
    // from rows; B from a tile whose rows are the contraction, transposed.
    __device__ __forceinline__ static FragmentReader rows_first(uint32_t tile, int lane) {
        return FragmentReader(tile, lane % 16, lane / 16);
    }
    // (rows 0-7, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 0), (rows 8-15, chunk 1): B from a tile whose columns
    // are the contraction; A from a tile whose rows are, transposed.
    __device__ __forceinline__ static FragmentReader chunks_first(uint32_t tile, int lane) {
        return FragmentReader(tile, lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }
    __device__ __forceinline__ uint32_t address(int row, int chunk) const {
        return (base ^ chunk % Tile::PERMUTED * 16) + row * Tile::ROW_BYTES +
               chunk / Tile::PERMUTED * Tile::PERMUTED * 16;
    }
};

// Where this thread starts in a tile that begins with first_row: load_tile's threads stand side by side on a row.
template <int COLUMNS>
__device__ __forceinline__ const bf16* tile_position(const bf16* first_row, int64_t stride_t) {
    constexpr int WIDTH = SwizzledTile<COLUMNS>::PERMUTED;
    return first_row + threadIdx.x / WIDTH * stride_t + threadIdx.x % WIDTH * 8;
}
// Starts copying ROWS rows of D columns into a tile, by THREADS threads, each from its tile_position; rows from
// num_rows on and columns from D on become zero. The pointer is stepped, not indexed: offsets of every copy would be
// hoisted out of the caller's loop and take the accumulators' registers.
template <int ROWS, int COLUMNS, int THREADS>
__device__ __forceinline__ void load_tile(uint32_t tile, const bf16* position, int64_t stride_t, int64_t num_rows,
                                          int D) {
    using Tile = SwizzledTile<COLUMNS>;
    constexpr int ROWS_PER_PASS = THREADS / Tile::PERMUTED;
    static_assert(ROWS % ROWS_PER_PASS == 0 && ROWS_PER_PASS % 8 == 0, "whole passes, of whole swizzle patterns");
    const int row = threadIdx.x / Tile::PERMUTED, chunk = threadIdx.x % Tile::PERMUTED;
    const uint32_t shared = tile + Tile::offset(row, chunk);
    const bool whole = num_rows >= ROWS && D == COLUMNS;
    const int rows_left = (int)min(num_rows, (int64_t)ROWS) - row, columns_left = D - chunk * 8;
#pragma unroll
    for (int pass_row = 0; pass_row < ROWS; pass_row += ROWS_PER_PASS) {
#pragma unroll
        for (int group = 0; group < COLUMNS; group += Tile::PERMUTED * 8) {
            cp_async_16(shared + pass_row * Tile::ROW_BYTES + group * 2, position + group,
                        whole || (pass_row < rows_left && group < columns_left));
        }
        position += ROWS_PER_PASS * stride_t;
    }
}
// The same from the first row's address.
template <int ROWS, int COLUMNS, int THREADS>
__device__ __forceinline__ void load_rows(uint32_t tile, const bf16* first_row, int64_t stride_t, int64_t num_rows,
                                          int D) {
    load_tile<ROWS, COLUMNS, THREADS>(tile, tile_position<COLUMNS>(first_row, stride_t), stride_t, num_rows, D);
}

// Rounds a warp's accumulators, times a factor for each row, into its rows of a tile; `tile` is the address of the
// first.
template <int COLUMNS, int M_TILES, int N_TILES>
__device__ __forceinline__ void store_fragments(uint32_t tile, const float (&c)[M_TILES][N_TILES][4],
                                                const float (&factor)[M_TILES][2], int first_chunk) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * m + 8 * half + lane / 4;
                const uint32_t address =
                    tile + SwizzledTile<COLUMNS>::offset(row, first_chunk + n) + lane % 4 * sizeof(uint32_t);
                store_shared_b32(
                    address, pack_bf16x2(c[m][n][2 * half] * factor[m][half], c[m][n][2 * half + 1] * factor[m][half]));
            }
        }
    }
}
// Copies ROWS rows of a tile, of one warp's, to memory: chunks [first_chunk, first_chunk + NUM_CHUNKS) of the first
// num_rows rows and D columns.
template <int COLUMNS, int ROWS, int NUM_CHUNKS>
__device__ __forceinline__ void store_rows(bf16* first_row, int64_t stride_t, uint32_t tile, int64_t num_rows, int D,
                                           int first_chunk) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int index = lane; index < ROWS * NUM_CHUNKS; index += WARP_SIZE) {
        const int row = index / NUM_CHUNKS, chunk = first_chunk + index % NUM_CHUNKS;
        if (row < num_rows && chunk * 8 < D) {
            *reinterpret_cast<int4*>(first_row + row * stride_t + chunk * 8) =
                load_shared_b128(tile + SwizzledTile<COLUMNS>::offset(row, chunk));
        }
    }
}

// ---- products ----------------------------------------------------------------------------------
template <int M_TILES, int N_TILES>
__device__ __forceinline__ void set_zero(float (&c)[M_TILES][N_TILES][4]) {
#pragma unroll
    for (int i = 0; i < M_TILES * N_TILES * 4; ++i) {
        c[i / (4 * N_TILES)][i / 4 % N_TILES][i % 4] = 0.0f;
    }
}
// c = rows of a times rows of b, contracted over their columns: M_TILES * 16 rows of a, N_TILES * 8 of b from b_row on.
template <int COLUMNS, int M_TILES, int N_TILES>
__device__ __forceinline__ void multiply_rows(float (&c)[M_TILES][N_TILES][4], const FragmentReader<COLUMNS>& a,
                                              const FragmentReader<COLUMNS>& b, int b_row) {
    set_zero(c);
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; ++k) {
        uint32_t a_fragment[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            ldmatrix_x4(a_fragment[m], a.address(16 * m, 2 * k));
        }
#pragma unroll
        for (int n = 0; n < N_TILES; n += 2) {
            uint32_t b_fragment[4];
            ldmatrix_x4(b_fragment, b.address(b_row + 8 * n, 2 * k));
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                mma_m16n8k16(c[m][n], a_fragment[m], b_fragment[0], b_fragment[1]);
                mma_m16n8k16(c[m][n + 1], a_fragment[m], b_fragment[2], b_fragment[3]);
            }
        }
    }
}
// Accumulators, rounded, as the A operand of the next product.
template <int M_TILES, int N_TILES>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[M_TILES][N_TILES / 2][4],
                                             const float (&c)[M_TILES][N_TILES][4]) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            a[m][n / 2][n % 2 * 2] = pack_bf16x2(c[m][n][0], c[m][n][1]);
            a[m][n / 2][n % 2 * 2 + 1] = pack_bf16x2(c[m][n][2], c[m][n][3]);
        }
    }
}
// c (+=) a b: the contraction runs over rows [b_row, b_row + 16 K_TILES) of b; columns of c are the chunks of b from
// b_chunk on.
template <int COLUMNS, int M_TILES, int K_TILES, int N_TILES>
__device__ __forceinline__ void multiply_add(float (&c)[M_TILES][N_TILES][4], const uint32_t (&a)[M_TILES][K_TILES][4],
                                             const FragmentReader<COLUMNS>& b, int b_row, int b_chunk) {
#pragma unroll
    for (int k = 0; k < K_TILES; ++k) {
#pragma unroll
        for (int n = 0; n < N_TILES; n += 2) {
            uint32_t b_fragment[4];
            ldmatrix_x4_trans(b_fragment, b.address(b_row + 16 * k, b_chunk + n));
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                mma_m16n8k16(c[m][n], a[m][k], b_fragment[0], b_fragment[1]);
                mma_m16n8k16(c[m][n + 1], a[m][k], b_fragment[2], b_fragment[3]);
            }
        }
    }
}

// ---- a block of query rows ----------------------------------------------------------------------
// What a block that owns query rows works on. Arguments: forward's or backward's.
template <class Tile>
struct QueryBlock {
    int b, h, kv_head, head;  // head: b * H + h
    int64_t first_row;
    int64_t warp_row;    // the first of this warp's rows
    int64_t first_seen;  // keys that the first row sees: every row does
    int64_t last_seen;   // keys that the last row sees: no row sees more

    template <class Arguments>
    __device__ __forceinline__ QueryBlock(const Arguments& args, int block) {
        const TileOrder::Place place = args.order.place(block);
        head = place.head;
        b = head / args.H;
        h = head % args.H;
        kv_head = h / args.heads_per_kv_head;
        // The last rows see most keys: they start first.
        first_row = (int64_t)(args.order.num_tiles - 1 - place.tile) * Tile::BLOCK_M;
        warp_row = first_row + threadIdx.x / WARP_SIZE * (16 * Tile::M_TILES);
        const int64_t end_row = min(args.Tq, first_row + Tile::BLOCK_M);
        first_seen = max((int64_t)0, min(args.Tk, first_row + 1 + args.key_offset));
        last_seen = max((int64_t)0, min(args.Tk, end_row + args.key_offset));
    }
};

// Of an accumulator's upper (half 0) or lower row: columns that `hides` names become -infinity. A column is counted
// from this lane's first, lane % 4 * 2.
template <int N_TILES, class Hides>
__device__ __forceinline__ void hide_columns(float (&scores)[N_TILES][4], int half, Hides hides) {
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float& score = scores[n][2 * half + i];
            score = hides(8 * n + i) ? -INFINITY : score;
        }
    }
}
// Scores of query rows [row, row + 16 M_TILES) and keys from `key` on become -infinity where the query does not see the
// key. All row and key numbers are those of the sequence.
template <int M_TILES, int N_TILES>
__device__ __forceinline__ void mask_scores(float (&scores)[M_TILES][N_TILES][4], int64_t row, int64_t key,
                                            int64_t key_offset, int64_t Tk) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t end = min(Tk, row + 16 * m + 8 * half + lane / 4 + 1 + key_offset);
            const int visible = (int)max((int64_t)0, min(end - key, (int64_t)(8 * N_TILES))) - lane % 4 * 2;
            hide_columns(scores[m], half, [&](int column) { return column >= visible; });
        }
    }
}

// ---- launch -------------------------------------------------------------------------------------
template <class Tile, class Arguments>
inline void mma_launch(void (*kernel)(Arguments), Arguments args, int blocks_per_tile, cudaStream_t stream) {
    const int num_bytes = (int)sizeof(typename Tile::Shared);
    allow_dynamic_shared_bytes(kernel, num_bytes);
    int blocks_an_sm;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_an_sm, kernel, Tile::THREADS, num_bytes));
    args.order.share_multiprocessors(blocks_an_sm, gpu_properties().num_sms, blocks_per_tile);
    kernel<<<args.order.num_tiles * args.order.num_heads * blocks_per_tile, Tile::THREADS, num_bytes, stream>>>(args);
    CUDA_CHECK_LAUNCH();
}
