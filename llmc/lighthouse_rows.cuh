// lighthouse_rows.cuh: what the Lighthouse stages that move rows (pool, gather, scatter) have in common: the shape of
// the layer, its operands seen as one list of heads, where a block and its lanes stand, and the two ways between tokens
// and entries: sums of entries' rows for every token, sums of tokens' rows for every entry.
#pragma once
#include <algorithm>

#include "attention_shape.cuh"
#include "lighthouse_geometry.h"

// The layer's sizes; a kernel argument.
struct LighthouseShape {
    LighthouseGeometry geometry;
    int B = 1;           // sequences
    int H = 1;           // query heads
    int Hkv = 1;         // key/value heads, each with its own selection; H % Hkv == 0
    int D = 128;         // head dim, a multiple of 8 up to 256
    float scale = 1.0f;  // of the scores q k^T
    LighthouseScorer scorer = LighthouseScorer::norm;
    int dilation = 4;  // of the dilated scorer
    // Where sequences are cut into chunks (lighthouse_context.cuh): how many neighbours in B belong to one sequence,
    // and whether the first of them is its start.
    int chunks = 1;
    bool starts = true;

    __host__ __device__ int num_heads() const { return H + 2 * Hkv; }  // of q, k and v together
    __host__ __device__ int64_t num_selections() const { return (int64_t)B * Hkv; }
};

// q [B, *, H, D], k and v [B, *, Hkv, D] as one list of H + 2 Hkv heads, in this order.
template <class Element>
struct QkvHeads {
    HeadView<Element> q, k, v;

    // As a tensor of one head.
    __device__ HeadView<Element> head(const LighthouseShape& shape, int head) const {
        return head < shape.H               ? heads_from(q, head)
               : head < shape.H + shape.Hkv ? heads_from(k, head - shape.H)
                                            : heads_from(v, head - shape.H - shape.Hkv);
    }
};
// The key/value head whose selection a head of that list follows.
__device__ inline int lighthouse_kv_head(const LighthouseShape& shape, int head) {
    return head < shape.H               ? head / (shape.H / shape.Hkv)
           : head < shape.H + shape.Hkv ? head - shape.H
                                        : head - shape.H - shape.Hkv;
}

// The geometry as kernels want it: every size of a level at hand, indices within a sequence in 32 bits.
struct LighthouseLevels {
    int T;
    int levels;
    int log2_pool;
    int num_slots;                      // of one selection
    int bits[LIGHTHOUSE_MAX_LEVELS];    // log2 of the level's window
    int size[LIGHTHOUSE_MAX_LEVELS];    // entries; 0 from `levels` on
    int offset[LIGHTHOUSE_MAX_LEVELS];  // pyramid address of the first entry

    explicit LighthouseLevels(const LighthouseGeometry& g)
        : T((int)g.T), levels(g.levels), log2_pool(g.log2_pool), num_slots((int)g.num_slots) {
        for (int level = 0; level < LIGHTHOUSE_MAX_LEVELS; ++level) {
            bits[level] = level < levels ? g.window_bits(level) : 0;
            size[level] = level < levels ? (int)g.level_size(level) : 0;
            offset[level] = level < levels ? (int)g.level_offset(level) : 0;
        }
    }
};

// ---- rows in registers ---------------------------------------------------------------------------
// A row of D bf16 is spread over ROW_LANES lanes, eight elements each; lanes beyond D / 8 hold zeros. ROW_LANES is 8,
// 16 or 32; smaller rows leave lanes idle.
constexpr int LIGHTHOUSE_ROW_THREADS = 256;

struct FloatRow {  // one lane's eight elements
    float value[8] = {};

    __device__ void add(const bf16x8& packed, float factor = 1.0f) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            value[i] = fmaf(factor, __bfloat162float(packed[i]), value[i]);
        }
    }
    __device__ void add(const FloatRow& other) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            value[i] += other.value[i];
        }
    }
    __device__ bf16x8 pack(float factor = 1.0f) const {
        bf16x8 packed;
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(factor * value[i], factor * value[i + 1]);
            packed[i] = pair.x, packed[i + 1] = pair.y;
        }
        return packed;
    }
};

// Which eight columns of a row a lane has in add_entries_to_tokens, and how it loads, rounds and stores them: these,
// which lie side by side, or those of lighthouse_gather.cuh, which turn.
struct AdjacentColumns {
    static constexpr bool TURN = false;

    __device__ static int first(int lane) { return 8 * lane; }
    __device__ bf16x8 load(const bf16* row) const { return load128(row); }
    __device__ void store(bf16* row, const bf16x8& packed) const { store128_streaming(row, packed); }
    __device__ bf16x8 pack(const FloatRow& row) const { return row.pack(); }
};

// How a launch divides the rows: a group of ROW_LANES lanes works on a piece of a sequence (a run of tokens, or whole
// windows) for one head. A block's groups have neighbouring pieces of one head; the next block has the same pieces of
// the next head, for the heads of a token lie side by side in packed rows.
struct RowGrid {
    int num_heads;
    int piece_tokens;
    int num_pieces;  // of a sequence
    unsigned blocks_per_head;
};

// Where this thread stands. Every lane stays to the end: the lanes of a group exchange values by shuffles.
template <int ROW_LANES>
struct RowGroup {
    static constexpr int GROUPS = LIGHTHOUSE_ROW_THREADS / ROW_LANES;  // in a block
    int lane;                                                          // within the row
    int head;
    int64_t b;
    int piece;
    bool exists;   // false in the last block's surplus groups
    bool columns;  // false also in lanes beyond D, which neither load nor store rows

    // pieces_per_group: of launch_row_groups; this is the group's first.
    __device__ RowGroup(const RowGrid& grid, int D, int pieces_per_group = 1) {
        const unsigned block = blockIdx.x / grid.num_heads;
        head = (int)(blockIdx.x - block * grid.num_heads);
        b = block / grid.blocks_per_head;
        lane = threadIdx.x % ROW_LANES;
        piece = (int)(block - (unsigned)b * grid.blocks_per_head) * GROUPS * pieces_per_group +
                (int)threadIdx.x / ROW_LANES;
        exists = piece < grid.num_pieces;
        columns = exists && lane * 8 < D;
    }
    __device__ int broadcast(int value, int from_lane) const {
        return __shfl_sync(FULL_WARP, value, from_lane, ROW_LANES);
    }
};

// Calls launch(ROW_LANES, MAX_LEVELS, grid, blocks), the first two integral_constants: the narrowest group that holds a
// row of D, and code for up to three levels, for four, which are what most runs have, or for all. num_tokens: of a
// sequence; piece_tokens: 0 means ROW_LANES; pieces_per_group: a block has so many for each of its groups.
template <class Launch>
inline void launch_row_groups(int64_t num_tokens, int piece_tokens, int num_heads, const LighthouseShape& shape,
                              Launch&& launch, int pieces_per_group = 1) {
    const int D = shape.D;
    CHECK(D % 8 == 0 && D >= 8 && D <= 256, "Lighthouse attention: head dim %d must be a multiple of 8 from 8 to 256",
          D);
    const auto with_lanes = [&](auto row_lanes) {
        constexpr int ROW_LANES = decltype(row_lanes)::value;
        RowGrid grid;
        grid.num_heads = num_heads;
        grid.piece_tokens = piece_tokens > 0 ? piece_tokens : ROW_LANES;
        grid.num_pieces = (int)ceil_div<int64_t>(num_tokens, grid.piece_tokens);
        grid.blocks_per_head = (unsigned)ceil_div(grid.num_pieces, RowGroup<ROW_LANES>::GROUPS * pieces_per_group);
        const int64_t blocks = (int64_t)grid.blocks_per_head * num_heads * shape.B;
        CHECK(blocks < (int64_t)1 << 31,
              "Lighthouse attention: %d sequences of %lld tokens and %d heads are more than one launch holds", shape.B,
              (long long)shape.geometry.T, num_heads);
        if (shape.geometry.levels <= 3) {
            launch(row_lanes, std::integral_constant<int, 3>(), grid, (unsigned)blocks);
        } else if (shape.geometry.levels == 4) {
            launch(row_lanes, std::integral_constant<int, 4>(), grid, (unsigned)blocks);
        } else {
            launch(row_lanes, std::integral_constant<int, LIGHTHOUSE_MAX_LEVELS>(), grid, (unsigned)blocks);
        }
    };
    if (D <= 64) {
        with_lanes(std::integral_constant<int, 8>());
    } else if (D <= 128) {
        with_lanes(std::integral_constant<int, 16>());
    } else {
        with_lanes(std::integral_constant<int, 32>());
    }
}

// 2^-bits: the share of a token in the mean over a window of 2^bits. Exact.
__device__ inline float lighthouse_share(int bits) { return __uint_as_float((uint32_t)(127 - bits) << 23); }

// ---- from entries to tokens ----------------------------------------------------------------------
// Which entry of level l a token j belongs to. Shifted is where outputs go (Eq. 10): the window after the entry's own.
enum class EntryOf { window, shifted_window };  // j / c;  (j + 1) / c - 1, none below 0

// Blocks a multiprocessor can hold without spilling registers; columns that turn keep their angles there too.
constexpr int entries_to_tokens_blocks(int max_levels, bool turn = false) {
    return max_levels <= 3 && !turn ? 5 : max_levels <= 4 ? 4 : 3;
}

// The tokens of one piece, ROW_LANES of them from piece * ROW_LANES on (shifted: one token earlier): row j of out (=)
// the sum over levels of row positions[level, entry of j] of x, where that is not negative; times 1 / c with
// EntryOf::window, whose rows are gradients of means. x and out: the head's rows of sequence b. The tokens of one
// level-1 window share every entry but their own: those are added up once. Lane i looks up the entries of token i; one
// round of loads for all positions, one for the shared rows, one for the tokens'. MAX_LEVELS: g.levels or more.
// columns: this lane's; columns that turn have each token's row packed, in the tokens' order.
template <int ROW_LANES, int MAX_LEVELS, EntryOf ENTRY, class Columns>
__device__ inline void add_entries_to_tokens(const LighthouseLevels& g, const RowGroup<ROW_LANES>& group,
                                             const int32_t* positions, const bf16* x, int64_t x_stride, bf16* out,
                                             int64_t out_stride, Columns columns) {
    constexpr int SHIFT = ENTRY == EntryOf::shifted_window ? 1 : 0;
    const int first = group.piece * ROW_LANES, place = first + group.lane;  // place: j + SHIFT
    x += Columns::first(group.lane), out += Columns::first(group.lane) + (first - SHIFT) * out_stride;
    int found[MAX_LEVELS];
#pragma unroll
    for (int level = 0; level < MAX_LEVELS; ++level) {
        found[level] = -1;
        if (level < g.levels) {
            const int index = (place >> g.bits[level]) - SHIFT;
            if (group.exists && index >= 0 && index < g.size[level]) {
                found[level] = positions[g.offset[level] + index];
            }
        }
    }
    const int segment = min(1 << g.log2_pool, ROW_LANES);
    for (int begin = 0; begin < ROW_LANES; begin += segment) {
        bf16x8 rows[MAX_LEVELS];
#pragma unroll
        for (int level = 1; level < MAX_LEVELS; ++level) {
            rows[level] = {};
            if (level < g.levels) {
                const int n = group.broadcast(found[level], begin);
                if (n >= 0 && group.columns) {
                    rows[level] = columns.load(x + n * x_stride);
                }
            }
        }
        FloatRow shared_sum;
#pragma unroll
        for (int level = 1; level < MAX_LEVELS; ++level) {
            if (level < g.levels) {
                shared_sum.add(rows[level], SHIFT ? 1.0f : lighthouse_share(g.bits[level]));
            }
        }
        const bf16x8 shared_row = shared_sum.pack();
        for (int i = begin; i < begin + segment; ++i, out += out_stride) {
            const int n = group.broadcast(found[0], i), j = first + i - SHIFT;
            if (!group.columns || j < 0 || j >= g.T) {
                continue;
            }
            bf16x8 row = shared_row;
            if (Columns::TURN || n >= 0) {
                FloatRow sum = shared_sum;
                if (n >= 0) {
                    sum.add(columns.load(x + n * x_stride));
                }
                row = columns.pack(sum);
            }
            columns.store(out, row);
        }
    }
}

// ---- from tokens to entries ----------------------------------------------------------------------
// Tokens whose rows are in flight, and blocks on a multiprocessor. With 4 tokens and one block more, gather is 4 %
// slower at L = 3, 1 % faster at L = 4 (H100).
constexpr int LIGHTHOUSE_CHUNK = 8;
constexpr int tokens_to_entries_blocks(int max_levels) { return max_levels <= 2 ? 4 : max_levels == 3 ? 3 : 2; }

// Tokens of a piece, the unit that a group of lanes works through: whole coarsest windows and whole chunks.
inline int lighthouse_piece_tokens(const LighthouseGeometry& g) {
    return (int)std::max<int64_t>(g.window(g.levels - 1), LIGHTHOUSE_CHUNK);
}

// For every entry of the levels below num_levels <= MAX_LEVELS whose tokens lie in the piece: row positions[entry] of
// out (=) the sum of its tokens' rows of x, where the position is not negative; times 1 / c with EntryOf::window, whose
// rows are means. A token is read once: the sums of a level are added up to the next one's. LIGHTHOUSE_CHUNK tokens'
// rows are in flight; lane i of the first as many looks up where the entries go whose last token is token i of a chunk.
//   place   of a token: j, or j + 1 where windows are shifted (EntryOf)
//   wanted(first)  bit i says whether the row at place first + i counts; the others are taken for zeros
template <int ROW_LANES, int MAX_LEVELS, EntryOf ENTRY, class Wanted>
__device__ inline void add_tokens_to_entries(const LighthouseLevels& g, const RowGroup<ROW_LANES>& group,
                                             int num_levels, int piece_tokens, const int32_t* positions, const bf16* x,
                                             int64_t x_stride, bf16* out, int64_t out_stride, Wanted wanted) {
    constexpr int SHIFT = ENTRY == EntryOf::shifted_window ? 1 : 0;
    FloatRow sums[MAX_LEVELS + 1];  // of levels 1 to MAX_LEVELS - 1, so far; the others are never used
    for (int done = 0; done < piece_tokens; done += LIGHTHOUSE_CHUNK) {
        const int first = group.piece * piece_tokens + done, place = first + group.lane;
        const bool inside = group.exists && group.lane < LIGHTHOUSE_CHUNK && place >= SHIFT && place < g.T;
        int found[MAX_LEVELS];
#pragma unroll
        for (int level = 0; level < MAX_LEVELS; ++level) {
            found[level] = -1;
            if (level < num_levels) {
                const int index = (place >> g.bits[level]) - SHIFT;
                const bool is_last = ((place + 1) & ((1 << g.bits[level]) - 1)) == 0;
                if (inside && is_last && index >= 0) {
                    found[level] = positions[g.offset[level] + index];
                }
            }
        }
        const unsigned rows_wanted = wanted(first);
        bf16x8 rows[LIGHTHOUSE_CHUNK];
        const bf16* x_row = x + (first - SHIFT) * x_stride;
#pragma unroll
        for (int i = 0; i < LIGHTHOUSE_CHUNK; ++i) {
            rows[i] = {};
            if ((rows_wanted >> i & 1) && group.columns) {
                rows[i] = load128_streaming(x_row);
            }
            x_row += x_stride;
        }
#pragma unroll
        for (int i = 0; i < LIGHTHOUSE_CHUNK; ++i) {
            const int n = group.broadcast(found[0], i);
            if (n >= 0 && group.columns) {
                store128(out + n * out_stride, rows[i]);
            }
            sums[1].add(rows[i]);
            // Windows of a level are 2^level tokens or more: the other places end none.
#pragma unroll
            for (int level = 1; level < MAX_LEVELS; ++level) {
                if ((i + 1) % min(1 << level, LIGHTHOUSE_CHUNK) != 0) {
                    break;
                }
                const int bits = g.bits[level];
                if (level >= num_levels || ((done + i + 1) & ((1 << bits) - 1)) != 0) {  // the same in every group
                    break;
                }
                const int n = group.broadcast(found[level], i);
                if (n >= 0 && group.columns) {
                    store128(out + n * out_stride, sums[level].pack(SHIFT == 0 ? lighthouse_share(bits) : 1.0f));
                }
                sums[level + 1].add(sums[level]);
                sums[level] = {};
            }
        }
    }
}
