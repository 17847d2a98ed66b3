// model_config.h: the shape of a Llama decoder and of its attention, the named presets, and the rules a shape must
// obey.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"

// Llama-3 frequency scaling of RoPE (Hugging Face rope_type "llama3"); factor 1 means off.
struct RopeScaling {
    double factor = 1.0;
    double low_freq_factor = 1.0;
    double high_freq_factor = 4.0;
    int64_t original_max_positions = 8192;

    bool enabled() const { return factor != 1.0; }
};

struct ModelConfig {
    int64_t vocab_size = 258;  // V
    int num_layers = 4;
    int width = 128;              // C, the residual stream
    int num_heads = 4;            // H, query heads
    int num_kv_heads = 2;         // Hkv, key/value heads; H % Hkv == 0
    int head_dim = 32;            // D
    int ffn_width = 384;          // F, of the SwiGLU gate and up projections
    bool tied_embeddings = true;  // the classifier shares the embedding's weight
    double rope_theta = 10000.0;
    RopeScaling rope_scaling;
    double norm_eps = 1e-5;
    double init_std = 0.02;     // of every matrix; the two that write the residual are scaled by 1/sqrt(2 * num_layers)
    int64_t max_positions = 0;  // written as max_position_embeddings; 0: the sequence length of the run

    int qkv_width() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
    int attention_width() const { return num_heads * head_dim; }
};

// The shape of a named preset. Throws for an unknown name, listing those that exist.
inline ModelConfig model_preset(const std::string& name) {
    ModelConfig m;
    if (name == "tiny") {
        return m;  // the defaults above: 0.8 M parameters, learns on two CPU cores in minutes
    }
    if (name == "lighthouse-530m") {  // arXiv:2605.06554 Sec. 6.1
        m.vocab_size = 128256, m.num_layers = 30, m.width = 1024, m.num_heads = 8, m.num_kv_heads = 8, m.head_dim = 128;
        m.ffn_width = 1536, m.tied_embeddings = false, m.rope_theta = 10000.0;
        return m;
    }
    if (name == "llama3.2-1b") {  // meta-llama/Llama-3.2-1B config.json
        m.vocab_size = 128256, m.num_layers = 16, m.width = 2048, m.num_heads = 32, m.num_kv_heads = 8, m.head_dim = 64;
        m.ffn_width = 8192, m.tied_embeddings = true, m.rope_theta = 500000.0;
        m.rope_scaling = {32.0, 1.0, 4.0, 8192}, m.max_positions = 131072;
        return m;
    }
    if (name == "llama3-8b") {  // meta-llama/Meta-Llama-3-8B config.json
        m.vocab_size = 128256, m.num_layers = 32, m.width = 4096, m.num_heads = 32, m.num_kv_heads = 8,
        m.head_dim = 128;
        m.ffn_width = 14336, m.tied_embeddings = false, m.rope_theta = 500000.0, m.max_positions = 8192;
        return m;
    }
    fail("--model '%s': no such preset; the presets are tiny, lighthouse-530m, llama3.2-1b, llama3-8b", name.c_str());
}

// Throws Error naming the first flag whose value breaks a rule, the rule, and the nearest value that works.
inline void validate(const ModelConfig& m) {
    CHECK(m.vocab_size >= 2 && m.vocab_size <= (int64_t)1 << 30, "--vocab_size %lld: must be from 2 to 2^30",
          (long long)m.vocab_size);
    CHECK(m.num_layers >= 1 && m.num_layers <= 1024, "--num_layers %d: must be from 1 to 1024", m.num_layers);
    auto multiple_of_8 = [](const char* flag, int value, int maximum) {
        CHECK(value >= 8 && value <= maximum && value % 8 == 0,
              "%s %d: must be a multiple of 8 from 8 to %d; the nearest is %d", flag, value, maximum,
              (std::clamp(value, 8, maximum) + 4) / 8 * 8);
    };
    multiple_of_8("--width", m.width, 1 << 17);
    multiple_of_8("--ffn_width", m.ffn_width, 1 << 18);
    multiple_of_8("--head_dim", m.head_dim, 256);
    CHECK(m.num_heads >= 1 && m.num_heads <= 1024, "--num_heads %d: must be from 1 to 1024", m.num_heads);
    if (m.num_kv_heads < 1 || m.num_heads % m.num_kv_heads != 0) {
        int nearest = 1;
        for (int divisor = 2; divisor <= m.num_heads; ++divisor) {
            const bool nearer =
                std::abs(divisor - (int64_t)m.num_kv_heads) < std::abs(nearest - (int64_t)m.num_kv_heads);
            nearest = m.num_heads % divisor == 0 && nearer ? divisor : nearest;
        }
        fail("--num_kv_heads %d: must divide --num_heads %d; the nearest that does is %d", m.num_kv_heads, m.num_heads,
             nearest);
    }
    CHECK(std::isfinite(m.rope_theta) && m.rope_theta > 1.0, "--rope_theta %s: must be greater than 1",
          number_text(m.rope_theta).c_str());
    CHECK((float)m.norm_eps > 0.0f && m.norm_eps <= 1.0, "--norm_eps %s: must be from 1e-45 to 1",
          number_text(m.norm_eps).c_str());
    CHECK((float)m.init_std > 0.0f && std::isfinite((float)m.init_std), "--init_std %s: must be from 1e-45 to 3e38",
          number_text(m.init_std).c_str());
    const RopeScaling& s = m.rope_scaling;
    CHECK(std::isfinite(s.factor) && s.factor >= 1.0, "--rope_scaling_factor %s: must be at least 1 (1: off)",
          number_text(s.factor).c_str());
    CHECK(!s.enabled() || (s.low_freq_factor > 0 && s.high_freq_factor > s.low_freq_factor),
          "--rope_high_freq_factor %s: must be greater than --rope_low_freq_factor %s, and both positive",
          number_text(s.high_freq_factor).c_str(), number_text(s.low_freq_factor).c_str());
    CHECK(!s.enabled() || s.original_max_positions > 0, "--rope_original_max_positions %lld: must be positive",
          (long long)s.original_max_positions);
    CHECK(m.max_positions >= 0, "--max_positions %lld: must not be negative", (long long)m.max_positions);
}

// The inverse frequencies of RoPE, in radians a position, [D / 2]: theta^(-2i/D), with Llama-3 scaling when enabled
// (Hugging Face modeling_rope_utils "llama3": long wavelengths divided by factor, short ones kept, a linear blend
// between).
inline std::vector<double> rope_inverse_frequencies(const ModelConfig& m) {
    const double pi = 3.14159265358979323846;
    std::vector<double> inverse_frequencies(m.head_dim / 2);
    for (size_t i = 0; i < inverse_frequencies.size(); ++i) {
        double f = std::pow(m.rope_theta, -2.0 * (double)i / m.head_dim);
        const RopeScaling& s = m.rope_scaling;
        if (s.enabled()) {
            const double wavelength = 2.0 * pi / f;
            const double turns = (double)s.original_max_positions / wavelength;  // within the original context
            if (turns < s.low_freq_factor) {
                f /= s.factor;
            } else if (turns <= s.high_freq_factor) {
                const double keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
                f = (1.0 - keep) * f / s.factor + keep * f;
            }
        }
        inverse_frequencies[i] = f;
    }
    return inverse_frequencies;
}

enum class AttentionMode { dense, lighthouse };
enum class LighthouseScorer { norm, dilated };

// Stage 1 attention (arXiv:2605.06554); its geometry rules are in lighthouse_geometry.h.
struct LighthouseConfig {
    int levels = 3;       // L, level 0 the tokens
    int pool = 4;         // p
    int64_t topk = 1536;  // k
    LighthouseScorer scorer = LighthouseScorer::norm;
    int dilation = 4;                                // delta of the dilated scorer
    std::vector<int> dense_layers = {0, 1, -2, -1};  // stay dense throughout; negative counts from the last

    // Whether decoder block `layer` of `num_layers` is one of those that switch.
    bool applies_to(int layer, int num_layers) const {
        return std::none_of(dense_layers.begin(), dense_layers.end(),
                            [&](int dense) { return (dense < 0 ? dense + num_layers : dense) == layer; });
    }
    int num_lighthouse_layers(int num_layers) const {
        int count = 0;
        for (int layer = 0; layer < num_layers; ++layer) {
            count += applies_to(layer, num_layers);
        }
        return count;
    }
};
