// test_hopper_softmax.cpp: the softmax of the attention forward for Hopper, compiled for the CPU with 32 threads for a
// warp: weights and log-sum of rows against float64, for scores that are negative, equal, rising, far apart or not
// there; which maxima get an exact weight, and how often references move. What only a GPU can say, dev/cuda's programs
// do.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

// ---- a warp ------------------------------------------------------------------------------------
#define __device__
#define __forceinline__ inline
constexpr int WARP_SIZE = 32;
constexpr unsigned FULL_WARP = 0xffffffffu;

struct ThreadIndex {
    int x;
};
static thread_local ThreadIndex threadIdx;

// All lanes meet, then see what each has brought.
class Meeting {
  public:
    uint32_t words[WARP_SIZE];
    void meet() {
        const int turn = turn_.load();
        if (arrived_.fetch_add(1) == WARP_SIZE - 1) {
            arrived_.store(0);
            turn_.fetch_add(1);
        }
        while (turn_.load() == turn) {
            std::this_thread::yield();
        }
    }

  private:
    std::atomic<int> arrived_{0}, turn_{0};
};
static Meeting meeting;

template <class To, class From>
static To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
template <class T>
static T __shfl_sync(unsigned, T value, int lane) {
    meeting.words[threadIdx.x] = bits<uint32_t>(value);
    meeting.meet();
    const T found = bits<T>(meeting.words[lane]);
    meeting.meet();
    return found;
}
template <class T>
static T __shfl_xor_sync(unsigned mask, T value, int other) {
    return __shfl_sync(mask, value, threadIdx.x ^ other);
}
static bool __any_sync(unsigned, bool mine) {
    meeting.words[threadIdx.x] = mine;
    meeting.meet();
    const bool any = std::any_of(meeting.words, meeting.words + WARP_SIZE, [](uint32_t word) { return word != 0; });
    meeting.meet();
    return any;
}
static float __int_as_float(int i) { return bits<float>(i); }
static float __uint_as_float(uint32_t i) { return bits<float>(i); }
static int __float_as_int(float f) { return bits<int>(f); }
static int __vimax3_s32(int a, int b, int c) { return std::max(a, std::max(b, c)); }
static float __fdividef(float a, float b) { return a / b; }
#define __log2f(x) std::log2(x)  // the C library has that name
static float exp2_approx(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;  // as the GPU's, without denormal numbers
}
using std::max;

#include "llmc/flash_attention_hopper_softmax.cuh"

namespace {

// ---- rows --------------------------------------------------------------------------------------
constexpr int ROWS = 16;               // of a warp
constexpr float SCALE_LOG2 = 0.1275f;  // about log2(e) / sqrt(128)

float round_to_bf16(float x) {
    const uint32_t u = bits<uint32_t>(x);
    return bits<float>((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u);
}

// What the forward makes of rows: each score's weight in the output, log2 of the sum, how often references moved.
struct Found {
    std::vector<double> weights;  // [ROWS][keys]
    float log2_sum[ROWS];
    int moves[ROWS] = {};
};
using Score = std::function<float(int row, int key)>;  // key: in the order in which they are seen

// The steps of a consumer's warp (flash_attention_hopper_forward.cuh, walk_keys): masked_tiles of the num_tiles tiles
// of N keys come first.
template <int N, References REFERENCES>
Found find(const std::vector<float>& scores, int num_tiles, int masked_tiles) {
    const int num_keys = num_tiles * N;
    Found found;
    found.weights.resize((size_t)ROWS * num_keys);
    const auto run_lane = [&](int lane) {
        threadIdx.x = lane;
        const auto row_of = [&](int i) { return lane / 4 + 8 * (i / 2 % 2); };
        const auto column_of = [&](int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; };
        const float inverse = 1.0f / SCALE_LOG2;
        SoftmaxRows rows;
        bool has_negative = true;
        for (int tile = 0; tile < num_tiles; ++tile) {
            const KeyProgress progress{tile + 1, num_tiles};
            float p[N / 2], factor[2] = {1.0f, 1.0f};
            for (int i = 0; i < N / 2; ++i) {
                p[i] = scores[(size_t)row_of(i) * num_keys + tile * N + column_of(i)];
            }
            if (tile == masked_tiles) {
                has_negative = __any_sync(FULL_WARP, rows.reference[0] < 0.0f || rows.reference[1] < 0.0f);
                if (REFERENCES == References::WHERE_HEAVY) {
                    find_limits<N>(rows, inverse, progress);
                }
            }
            const bool moves =
                tile < masked_tiles
                    ? softmax_tile<true, References::ANY>(p, rows, factor, SCALE_LOG2, inverse, progress)
                : has_negative ? softmax_tile<false, References::ANY>(p, rows, factor, SCALE_LOG2, inverse, progress)
                               : softmax_tile<false, REFERENCES>(p, rows, factor, SCALE_LOG2, inverse, progress);
            // What the lane has of the output: its own columns' weights.
            for (int i = 0; moves && i < N / 2; ++i) {
                for (int before = 0; before < tile; ++before) {
                    found.weights[(size_t)row_of(i) * num_keys + before * N + column_of(i)] *= factor[i / 2 % 2];
                }
            }
            for (int half = 0; moves && tile > 0 && lane % 4 == 0 && half < 2; ++half) {
                found.moves[lane / 4 + 8 * half] += factor[half] != 1.0f;
            }
            uint32_t operand[N / 16][4];
            for (int i = 0; i < N / 2; ++i) {
                const float rounded = round_to_bf16(p[i]);
                found.weights[(size_t)row_of(i) * num_keys + tile * N + column_of(i)] = rounded;
                uint32_t& pair = operand[i / 8][i / 2 % 4];
                pair = i % 2 == 0 ? bits<uint32_t>(rounded) >> 16 : pair | bits<uint32_t>(rounded);
            }
            if (num_tiles == 1) {
                find_rounding(operand, rows);
            }
        }
        const RowTotals totals = row_totals(rows);
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            const bool sees_nothing = totals.sum[half] == 0.0f;
            for (int key = 0; key < num_keys; ++key) {
                if (key % 8 / 2 == lane % 4) {
                    found.weights[(size_t)row * num_keys + key] *= sees_nothing ? 0.0 : 1.0 / totals.divisor[half];
                }
            }
            if (lane % 4 == 0) {
                found.log2_sum[row] =
                    sees_nothing ? -INFINITY : totals.reference[half] * SCALE_LOG2 + std::log2(totals.sum[half]);
            }
        }
    };
    std::vector<std::thread> lanes;
    for (int lane = 0; lane < WARP_SIZE; ++lane) {
        lanes.emplace_back(run_lane, lane);
    }
    for (std::thread& lane : lanes) {
        lane.join();
    }
    return found;
}

struct Checked {
    double top_error = 0.0;  // of the rows' largest weights, relative
    double moves = 0.0;      // a row
};
// Checks what is found of such scores: a weight is off by at most a rounding to bf16, twice, for the divisor may be of
// rounded P; the log of a sum by a few roundings of float32.
template <int N, References REFERENCES>
Checked check(const char* name, int num_tiles, const Score& score, int masked_tiles = 1) {
    SCOPED_TRACE(testing::Message() << name << ", " << num_tiles << " tiles of " << N << ", references "
                                    << (int)REFERENCES);
    const int num_keys = num_tiles * N;
    std::vector<float> scores;
    for (int row = 0; row < ROWS; ++row) {
        for (int key = 0; key < num_keys; ++key) {
            scores.push_back(score(row, key));
        }
    }
    const Found found = find<N, REFERENCES>(scores, num_tiles, masked_tiles);
    Checked checked;
    for (int row = 0; row < ROWS; ++row) {
        const float* const s = &scores[(size_t)row * num_keys];
        const double* const weights = &found.weights[(size_t)row * num_keys];
        const double top = *std::max_element(s, s + num_keys);
        if (top == -INFINITY) {
            EXPECT_EQ(found.log2_sum[row], -INFINITY) << "row " << row;
            EXPECT_TRUE(std::all_of(weights, weights + num_keys, [](double w) { return w == 0.0; })) << "row " << row;
            continue;
        }
        double sum = 0.0, worst = 0.0;
        for (int key = 0; key < num_keys; ++key) {
            sum += std::exp2((s[key] - top) * (double)SCALE_LOG2);
        }
        for (int key = 0; key < num_keys; ++key) {
            const double exact = std::exp2((s[key] - top) * (double)SCALE_LOG2) / sum;
            const double error = std::fabs(weights[key] - exact) / std::max(exact, 0x1p-20);
            worst = std::isfinite(error) ? std::max(worst, error) : INFINITY;
            if (s[key] == top) {
                checked.top_error = std::max(checked.top_error, error);
            }
        }
        EXPECT_LE(worst, 0x1p-7) << "row " << row;
        const double log2_sum = top * SCALE_LOG2 + std::log2(sum);
        EXPECT_NEAR(found.log2_sum[row], log2_sum, 0x1p-21 * (4.0 + std::fabs(log2_sum))) << "row " << row;
        checked.moves += (double)found.moves[row] / ROWS;
    }
    return checked;
}

// ---- tests -------------------------------------------------------------------------------------
constexpr double EXACT = 0x1p-15;  // what float32 leaves of scores of a few hundred

template <int N, References REFERENCES>
void check_corners() {
    std::mt19937 random(N + (int)REFERENCES);
    std::normal_distribution<float> normal;
    const auto noise = [&](float deviation) { return deviation * normal(random); };
    const auto run = [&](const char* name, int num_tiles, const Score& score, int masked_tiles = 1) {
        return check<N, REFERENCES>(name, num_tiles, score, masked_tiles);
    };
    for (const int num_tiles : {1, 2, 7}) {
        run("ordinary", num_tiles, [&](int, int) { return noise(11.0f); });
    }
    run("large", 5, [&](int, int) { return noise(3000.0f); });
    for (const float below : {-5.0f, -40.0f, -300.0f, -1000.0f, -3000.0f}) {
        run("negative", 5, [&](int, int) { return noise(1.0f) + below; });
    }
    // 400 powers of two apart: a reference from among the first overflows with the others.
    run("far below zero, then near", 6, [&](int, int key) { return noise(1.0f) - (key < 3 * N ? 3200.0f : 10.0f); });
    run("far below zero, then above", 6, [&](int, int key) { return noise(1.0f) + (key < 3 * N ? -3200.0f : 10.0f); });
    run("the same of one row", 6,
        [&](int row, int key) { return row != 5 ? noise(11.0f) : noise(1.0f) - (key < 3 * N ? 3200.0f : 10.0f); });
    run("zeros", 3, [](int, int) { return 0.0f; });
    run("zeros below zero", 3, [](int, int) { return -0.0f; });
    run("zeros below zero behind negative ones", 3, [](int, int key) { return key < N ? -7.0f : -0.0f; });
    run("a zero below zero, then far below, then near", 3, [](int, int key) {
        return key < N ? -0.0f : key < 2 * N ? -3200.0f : -10.0f;
    });
    run("equal", 3, [](int, int) { return 3.25f; });
    run("rising", 12, [](int, int key) { return 0.3f * key; });
    run("rising from far below", 12, [](int, int key) { return -3000.0f + 6.0f * key; });
    run("falling", 12, [](int, int key) { return 600.0f - 0.7f * key; });
    run("a diagonal", 3, [&](int row, int key) { return key < N && key > row ? -INFINITY : noise(11.0f); });
    run(
        "rows that see nothing in the first tile", 4,
        [&](int row, int key) { return key < N + 3 * (row - 4) ? -INFINITY : noise(11.0f); }, 2);
    run(
        "nothing", 2, [](int, int) { return -INFINITY; }, 2);
    run("one tile, few keys", 1, [&](int row, int key) { return key > row ? -INFINITY : noise(30.0f); });
}
TEST(HopperSoftmax, AnyMaximum) { check_corners<128, References::ANY>(); }
TEST(HopperSoftmax, EveryTile) { check_corners<80, References::EVERY_TILE>(); }
TEST(HopperSoftmax, WhereHeavy) { check_corners<64, References::WHERE_HEAVY>(); }

TEST(HopperSoftmax, LargestWeightsAreExact) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (const float deviation : {11.0f, 45.0f}) {  // of scaled scores 1 and 4
        const Score score = [&](int, int) { return deviation * normal(random); };
        const Checked every = check<80, References::EVERY_TILE>("every", 12, score);
        EXPECT_LE(every.top_error, EXACT);
        EXPECT_GT(every.moves, 0.0);
        const Checked heavy = check<80, References::WHERE_HEAVY>("heavy", 12, score);
        EXPECT_LE(heavy.top_error, EXACT);  // of so few keys all that are largest are heavy
    }
    // A peaked row of many keys has a heavy maximum wherever it is.
    const Checked peaked = check<80, References::WHERE_HEAVY>(
        "one large", 40, [&](int row, int key) { return key == 100 + 190 * row ? 150.0f : 11.0f * normal(random); });
    EXPECT_LE(peaked.top_error, EXACT);
}
// Of flat rows of many keys no score is heavy, and references hardly move.
TEST(HopperSoftmax, LightMaximaMoveNothing) {
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    const Score score = [&](int, int) { return 11.0f * normal(random); };
    const Checked every = check<80, References::EVERY_TILE>("every", 60, score);
    const Checked heavy = check<80, References::WHERE_HEAVY>("heavy", 60, score);
    EXPECT_GT(every.moves, 2.0);  // about the logarithm of the number of tiles
    EXPECT_LT(heavy.moves, 0.5);
    EXPECT_GT(heavy.top_error, EXACT);
}
// Of a row with a single tile the weights add up to one.
TEST(HopperSoftmax, WeightsOfOneTileAddUp) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    constexpr int N = 64;
    std::vector<float> scores(ROWS * N);
    std::generate(scores.begin(), scores.end(), [&] { return 20.0f * normal(random); });
    const Found found = find<N, References::EVERY_TILE>(scores, 1, 1);
    for (int row = 0; row < ROWS; ++row) {
        double sum = 0.0;
        for (int key = 0; key < N; ++key) {
            sum += found.weights[row * N + key];
        }
        EXPECT_NEAR(sum, 1.0, 0x1p-22) << "row " << row;
    }
}

}  // namespace
