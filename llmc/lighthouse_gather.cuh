// lighthouse_gather.cuh: the rows of the sub-sequence, and back. Row n of q~, k~, v~ is the mean of q, k, v over the
// window of entry n; backward, token j takes from every level the gradient of the entry that holds it, over its window,
// and where tokens had turned by their positions (rope.cuh), their rows of dq and dk can be turned back.
// Shapes: out q [B, S, H, D], k and v [B, S, Hkv, D]; qkv the same with T for S; pooled [B, T / c, H + 2 Hkv, D] from
// lighthouse_pool: the coarsest entries are copied from it, the finer averaged from tokens. positions [B, Hkv,
// num_slots] from lighthouse_select.
// Cost: memory bound. Forward reads the tokens under selected coarsest entries once, the coarsest means, and writes S
// rows; backward reads S rows (again from L2) and writes T.
// Reference: reference/lighthouse.h. Variants: dev/cuda/lighthouse_gather.cu.
#pragma once
#include "lighthouse_rows.cuh"
#include "rope.cuh"

struct LighthouseGatherArguments {
    QkvHeads<bf16> out;       // forward: [B, S, ...], backward: [B, T, ...]
    QkvHeads<const bf16> in;  // forward: [B, T, ...], backward: [B, S, ...]
    const bf16* pooled;       // forward
    const int32_t* positions;
    LighthouseShape shape;
    LighthouseLevels levels;
    RowGrid grid;
};

// ---- forward -----------------------------------------------------------------------------------
// Pieces of a head that a block looks at, for each of its groups of lanes. A block stays until the slowest of its
// groups is done, and nobody wants the tokens of most pieces: the groups share the others. With a piece a group 72 % of
// copy instead of 86 at T = 98304, L = 3, and 59 instead of 87 at 524288, L = 4 (H200); with 2 or 8 pieces 82 and 80,
// 75 and 85, and with the coarsest rows first 85 and 87.
constexpr int LIGHTHOUSE_GATHER_PIECES = 4;

// Launch: a block for GROUPS * LIGHTHOUSE_GATHER_PIECES pieces of max(c, LIGHTHOUSE_CHUNK) tokens of a head; 1-D grid.
// Memory bound.
template <int ROW_LANES, int MAX_LEVELS>
__global__ void __launch_bounds__(LIGHTHOUSE_ROW_THREADS, tokens_to_entries_blocks(MAX_LEVELS - 1))
    lighthouse_gather_kernel(const __grid_constant__ LighthouseGatherArguments a) {
    constexpr int GROUPS = RowGroup<ROW_LANES>::GROUPS, PIECES = GROUPS * LIGHTHOUSE_GATHER_PIECES;
    static_assert(PIECES % WARP_SIZE == 0 && PIECES <= LIGHTHOUSE_ROW_THREADS, "a thread looks at one piece");
    constexpr int WARPS = PIECES / WARP_SIZE;
    __shared__ int num_wanted[WARPS];  // pieces, of those that a warp looks at
    __shared__ int wanted_pieces[PIECES];
    __shared__ unsigned wanted_tokens[PIECES];
    const LighthouseShape& shape = a.shape;
    const LighthouseLevels& g = a.levels;
    const int num_heads = shape.num_heads();
    RowGroup<ROW_LANES> group(a.grid, shape.D, LIGHTHOUSE_GATHER_PIECES);
    const int own_group = threadIdx.x / ROW_LANES, first_piece = group.piece - own_group;
    const int num_pieces = min(PIECES, a.grid.num_pieces - first_piece);
    const int32_t* positions =
        a.positions + (group.b * shape.Hkv + lighthouse_kv_head(shape, group.head)) * (int64_t)g.num_slots;
    const HeadView<bf16> out = a.out.head(shape, group.head);
    bf16* const out_rows = out.row(group.b, 0, 0) + group.lane * 8;
    const int coarsest = g.levels - 1, coarsest_bits = g.bits[coarsest], num_coarsest = g.size[coarsest];
    const int windows = max(a.grid.piece_tokens >> coarsest_bits, 1);  // of a piece; if several, a piece is one chunk

    // The children of a coarsest entry are all there, or none: then nobody wants its tokens. Bit i: token i of a chunk.
    unsigned wanted = 0;
    if ((int)threadIdx.x < num_pieces) {
        const int32_t* children = positions + g.offset[coarsest - 1];
        const int children_bits = coarsest_bits - g.bits[coarsest - 1];
        const int begin = (first_piece + (int)threadIdx.x) * windows;
        const unsigned tokens = windows == 1 ? ~0u : (1u << (1 << coarsest_bits)) - 1;
        for (int i = 0; i < windows && begin + i < num_coarsest; ++i) {
            wanted |= children[(begin + i) << children_bits] >= 0 ? tokens << (i << coarsest_bits) : 0;
        }
    }
    const int warp = threadIdx.x / WARP_SIZE, warp_lane = threadIdx.x % WARP_SIZE;
    const unsigned wanted_of_warp = __ballot_sync(FULL_WARP, wanted != 0);
    if (warp < WARPS) {
        wanted_tokens[threadIdx.x] = 0;  // none where the list below ends
        if (warp_lane == 0) {
            num_wanted[warp] = __popc(wanted_of_warp);
        }
    }
    __syncthreads();
    if (wanted != 0) {
        int place = __popc(wanted_of_warp & ((1u << warp_lane) - 1));
        for (int w = 0; w < warp; ++w) {
            place += num_wanted[w];
        }
        wanted_pieces[place] = first_piece + (int)threadIdx.x;
        wanted_tokens[place] = wanted;
    }
    __syncthreads();

    const HeadView<const bf16> in = a.in.head(shape, group.head);
    const bf16* const in_rows = in.row(group.b, 0, 0) + group.lane * 8;
#pragma unroll 1
    for (int place = own_group; place < PIECES; place += GROUPS) {
        group.exists = wanted_tokens[place] != 0;
        if (!__any_sync(FULL_WARP, group.exists)) {
            break;
        }
        group.columns = group.exists && group.lane * 8 < shape.D;
        group.piece = group.exists ? wanted_pieces[place] : 0;
        add_tokens_to_entries<ROW_LANES, MAX_LEVELS - 1, EntryOf::window>(
            g, group, coarsest, a.grid.piece_tokens, positions, in_rows, in.stride_t, out_rows, out.stride_t,
            [&](int) { return wanted_tokens[place]; });
    }
    // The coarsest entries' rows, first by groups that had nothing else to do.
    const int end_window = min((first_piece + num_pieces) * windows, num_coarsest);
#pragma unroll 2
    for (int i = first_piece * windows + own_group; i < end_window; i += GROUPS) {
        const int n = positions[g.offset[coarsest] + i];
        if (group.lane * 8 < shape.D) {
            const int64_t pooled_row = (group.b * num_coarsest + i) * num_heads + group.head;
            store128(out_rows + n * out.stride_t, load128_streaming(a.pooled + pooled_row * shape.D + group.lane * 8));
        }
    }
}

// out (=) the rows of the sub-sequence, bf16 of float32 means, for every entry that has a position.
inline void lighthouse_gather(const QkvHeads<bf16>& out, const QkvHeads<const bf16>& qkv, const bf16* pooled,
                              const int32_t* positions, const LighthouseShape& shape, cudaStream_t stream) {
    NVTX_RANGE();
    const LighthouseGeometry& g = shape.geometry;
    launch_row_groups(
        g.T, lighthouse_piece_tokens(g), shape.num_heads(), shape,
        [&](auto row_lanes, auto max_levels, const RowGrid& grid, unsigned blocks) {
            const LighthouseGatherArguments a = {out, qkv, pooled, positions, shape, LighthouseLevels(g), grid};
            lighthouse_gather_kernel<decltype(row_lanes)::value, decltype(max_levels)::value>
                <<<blocks, LIGHTHOUSE_ROW_THREADS, 0, stream>>>(a);
        },
        LIGHTHOUSE_GATHER_PIECES);
    CUDA_CHECK_LAUNCH();
}

// ---- backward ----------------------------------------------------------------------------------
// Columns 4 lane .. 4 lane + 3 of a row and the same of its second half, with which they turn: elements 0 to 3 and 4 to
// 7. The first token's angles are exact; from one to the next they turn by that of one position, up to 31 times: 2^-18.
struct TurningColumns {
    static constexpr bool TURN = true;
    int half;             // D / 2
    float2 angle[4];      // of the next token
    const float2* steps;  // of one position: in shared memory, where they take no registers

    // turns_per_position, steps: of all frequencies, those that do not exist too.
    __device__ TurningColumns(int half, int lane, int64_t position, const double* turns_per_position,
                              const float2* steps)
        : half(half), steps(steps + 4 * lane) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            angle[i] = rope_cos_sin(position, turns_per_position[4 * lane + i]);
        }
    }
    __device__ static int first(int lane) { return 4 * lane; }
    __device__ bf16x8 load(const bf16* row) const {
        bf16x8 packed;
        const int2 low = *reinterpret_cast<const int2*>(row), high = *reinterpret_cast<const int2*>(row + half);
        *reinterpret_cast<int4*>(packed.data) = make_int4(low.x, low.y, high.x, high.y);
        return packed;
    }
    __device__ void store(bf16* row, const bf16x8& packed) const {
        const int4 bits = *reinterpret_cast<const int4*>(packed.data);
        __stcs(reinterpret_cast<int2*>(row), make_int2(bits.x, bits.y));
        __stcs(reinterpret_cast<int2*>(row + half), make_int2(bits.z, bits.w));
    }
    // Of the next token.
    __device__ bf16x8 pack(FloatRow row) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            rope_turn_back(row.value[i], row.value[4 + i], angle[i]);
            angle[i] = rope_add_angles(angle[i], steps[i]);
        }
        return row.pack();
    }
};

struct LighthouseGatherBackwardArguments {
    LighthouseGatherArguments gather;
    RopeRotation rotation;  // with TURNS_BACK
};

// Launch: one group of ROW_LANES lanes for as many tokens of a head; 1-D grid. Memory bound. TURNS_BACK: the heads of q
// and k. Those of v, whole blocks, go without.
template <int ROW_LANES, int MAX_LEVELS, bool TURNS_BACK>
__global__ void __launch_bounds__(LIGHTHOUSE_ROW_THREADS, entries_to_tokens_blocks(MAX_LEVELS, TURNS_BACK))
    lighthouse_gather_backward_kernel(const __grid_constant__ LighthouseGatherBackwardArguments arguments) {
    const LighthouseGatherArguments& a = arguments.gather;
    const LighthouseShape& shape = a.shape;
    const RowGroup<ROW_LANES> group(a.grid, shape.D);
    const int64_t selection = group.b * shape.Hkv + lighthouse_kv_head(shape, group.head);
    const HeadView<const bf16> in = a.in.head(shape, group.head);
    const HeadView<bf16> out = a.out.head(shape, group.head);
    auto add_entries = [&](auto columns) {
        add_entries_to_tokens<ROW_LANES, MAX_LEVELS, EntryOf::window>(
            a.levels, group, a.positions + selection * a.levels.num_slots, in.row(group.b, 0, 0), in.stride_t,
            out.row(group.b, 0, 0), out.stride_t, columns);
    };
    if (!TURNS_BACK || group.head >= shape.H + shape.Hkv) {
        return add_entries(AdjacentColumns());
    }
    __shared__ double turns_per_position[4 * ROW_LANES];
    __shared__ float2 steps[4 * ROW_LANES];
    if (threadIdx.x < 4 * ROW_LANES) {
        const double turns = arguments.rotation.frequencies.turns_per_position[threadIdx.x];
        turns_per_position[threadIdx.x] = turns;
        steps[threadIdx.x] = rope_cos_sin(1, turns);
    }
    __syncthreads();
    const int64_t token = (unsigned)group.b % shape.chunks * shape.geometry.T + group.piece * ROW_LANES;
    add_entries(
        TurningColumns(shape.D / 2, group.lane, arguments.rotation.positions.at(token), turns_per_position, steps));
}

// dqkv (=) [B, T, ...] from dout, the gradients of the gathered rows [B, S, ...]. rotation: the tokens' q and k had
// been turned by it, and dq and dk come out turned back; its runs of rows are a sequence's shape.chunks chunks of T.
inline void lighthouse_gather_backward(const QkvHeads<bf16>& dqkv, const QkvHeads<const bf16>& dout,
                                       const int32_t* positions, const LighthouseShape& shape, cudaStream_t stream,
                                       const RopeRotation* rotation = nullptr) {
    NVTX_RANGE();
    const LighthouseGeometry& g = shape.geometry;
    CHECK(rotation == nullptr || (rotation->positions.T == shape.chunks * g.T && rotation->positions.run_rows == g.T),
          "Lighthouse attention: rows that are turned back must be %d runs of %lld positions", shape.chunks,
          (long long)g.T);
    launch_row_groups(
        g.T, 0, shape.num_heads(), shape, [&](auto row_lanes, auto max_levels, const RowGrid& grid, unsigned blocks) {
            constexpr int ROW_LANES = decltype(row_lanes)::value, MAX_LEVELS = decltype(max_levels)::value;
            const LighthouseGatherBackwardArguments a = {
                {dqkv, dout, nullptr, positions, shape, LighthouseLevels(g), grid},
                rotation != nullptr ? *rotation : RopeRotation()};
            const auto kernel = rotation != nullptr ? lighthouse_gather_backward_kernel<ROW_LANES, MAX_LEVELS, true>
                                                    : lighthouse_gather_backward_kernel<ROW_LANES, MAX_LEVELS, false>;
            kernel<<<blocks, LIGHTHOUSE_ROW_THREADS, 0, stream>>>(a);
        });
    CUDA_CHECK_LAUNCH();
}
