// test_zero_layout.cpp: buckets and shards of the optimizer's state, for models and numbers of ranks of all kinds.
#include <gtest/gtest.h>

#include <set>

#include "llmc/parameters.h"
#include "llmc/zero_layout.h"

namespace {

std::vector<ZeroTensor> tensors_of(const ModelConfig& config) {
    const ParameterTable table = make_parameter_table(config);
    std::vector<ZeroTensor> tensors;
    for (const ParameterTensor& t : table.tensors) {
        tensors.push_back({t.num_elements(), t.decay, -1});
    }
    for (int l = 0; l < config.num_layers; ++l) {
        const LayerParameters& p = table.layers[l];
        for (const int tensor : {p.qkv, p.attention_out, p.gate_up, p.down}) {
            tensors[tensor].final_after = l;
        }
    }
    if (table.classifier != table.embedding) {
        tensors[table.classifier].final_after = config.num_layers;
    }
    return tensors;
}
std::vector<ModelConfig> configs() {
    std::vector<ModelConfig> all = {model_preset("tiny"), model_preset("lighthouse-530m"), model_preset("llama3.2-1b")};
    all[0].tied_embeddings = false;
    all.push_back(model_preset("tiny"));
    all.back().num_layers = 1;
    return all;
}

TEST(ZeroLayout, ShardsCoverEveryElementOnce) {
    for (const ModelConfig& config : configs()) {
        const std::vector<ZeroTensor> tensors = tensors_of(config);
        for (const int num_ranks : {1, 2, 3, 8, 256}) {
            const ZeroLayout layout = make_zero_layout(tensors, num_ranks);
            int64_t end = 0, shard_end = 0;
            for (const ZeroBucket& bucket : layout.buckets) {
                EXPECT_EQ(bucket.begin, end);
                EXPECT_EQ(bucket.shard_begin, shard_end);
                EXPECT_EQ(layout.slice_elements(bucket) * num_ranks, bucket.num_elements);
                EXPECT_EQ(layout.slice_elements(bucket) % ZERO_ALIGNMENT, 0);
                end += bucket.num_elements;
                shard_end += layout.slice_elements(bucket);
            }
            EXPECT_EQ(end, layout.num_elements);
            EXPECT_EQ(shard_end, layout.shard_elements());
            for (size_t i = 0; i < tensors.size(); ++i) {
                EXPECT_EQ(layout.offsets[i] % ZERO_ALIGNMENT, 0);
                // Pieces of all ranks: the tensor from end to end, each at its element's place in the slice.
                std::set<std::pair<int64_t, int64_t>> ranges;
                for (int rank = 0; rank < num_ranks; ++rank) {
                    for (const ZeroPiece& piece : layout.pieces((int)i, rank)) {
                        EXPECT_TRUE(ranges.emplace(piece.tensor_begin, piece.num_elements).second);
                        const int64_t at = layout.offsets[i] + piece.tensor_begin;
                        for (const ZeroBucket& bucket : layout.buckets) {
                            if (at >= bucket.begin && at < bucket.begin + bucket.num_elements) {
                                EXPECT_EQ(piece.shard_begin - bucket.shard_begin,
                                          at - layout.slice_begin(bucket, rank));
                            }
                        }
                    }
                }
                int64_t covered = 0;
                for (const auto& [begin, num_elements] : ranges) {
                    EXPECT_EQ(begin, covered);
                    covered += num_elements;
                }
                EXPECT_EQ(covered, tensors[i].num_elements);
            }
            // Padding stays small.
            int64_t used = 0;
            for (const ZeroTensor& tensor : tensors) {
                used += tensor.num_elements;
            }
            EXPECT_LE(layout.num_elements - used,
                      ZERO_ALIGNMENT * ((int64_t)tensors.size() + num_ranks * (int64_t)layout.buckets.size()));
        }
    }
}

TEST(ZeroLayout, BucketsAreOneKindAndFinalAfterTheirLastLayer) {
    for (const ModelConfig& config : configs()) {
        const std::vector<ZeroTensor> tensors = tensors_of(config);
        for (const int64_t bucket_elements : {(int64_t)1, (int64_t)1 << 16, ZERO_BUCKET_ELEMENTS, (int64_t)1 << 40}) {
            const ZeroLayout layout = make_zero_layout(tensors, 4, bucket_elements);
            for (const ZeroBucket& bucket : layout.buckets) {
                int last = config.num_layers + 1;
                for (size_t i = 0; i < tensors.size(); ++i) {
                    const int64_t at = layout.offsets[i] - bucket.begin;
                    if (at >= 0 && at < bucket.num_elements) {
                        EXPECT_EQ(tensors[i].decay, bucket.decay);
                        last = std::min(last, tensors[i].final_after);
                    }
                }
                EXPECT_EQ(bucket.final_after, last);
            }
        }
        // Without a minimum every layer's matrices are a bucket, and the classifier's is reduced first.
        const ZeroLayout fine = make_zero_layout(tensors, 4, 1);
        std::set<int> layers;
        for (const ZeroBucket& bucket : fine.buckets) {
            layers.insert(bucket.final_after);
        }
        for (int l = 0; l < config.num_layers; ++l) {
            EXPECT_EQ(layers.count(l), 1u);
        }
        EXPECT_EQ(layers.count(-1), 1u);
        EXPECT_EQ(layers.count(config.num_layers), config.tied_embeddings ? 0u : 1u);
    }
}

// One rank's layout is that of a run without shards.
TEST(ZeroLayout, OneRankHoldsAll) {
    const ZeroLayout layout = make_zero_layout(tensors_of(model_preset("lighthouse-530m")), 1);
    for (size_t i = 0; i < layout.offsets.size(); ++i) {
        const std::vector<ZeroPiece> pieces = layout.pieces((int)i, 0);
        ASSERT_EQ(pieces.size(), 1u);
        EXPECT_EQ(pieces[0].shard_begin, layout.offsets[i]);
    }
}

}  // namespace
