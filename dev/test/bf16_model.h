// bf16_model.h: a plain bf16 implementation of the step on the CPU, to know how much error bf16 storage makes whoever
// does it: the operations of llmc/reference in float, and every result that the GPU model stores in bf16 rounded to it.
// The GPU model may be at most twice as far from float64 as this is (test_gpt.cu).
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "llmc/reference/model.h"

namespace reference {

// The nearest bf16, ties to even; NaN stays NaN.
inline float round_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return value;
    }
    bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}
inline void round_to_bf16(std::vector<float>& values) {
    for (float& value : values) {
        value = round_to_bf16(value);
    }
}

// Forward and backward only: weights are set, gradients read, by tensor of the parameter table.
class Bf16Model {
  public:
    using Values = std::vector<float>;

    Bf16Model(const ModelConfig& config, AttentionMode attention, const LighthouseConfig& lighthouse)
        : config_(config),
          attention_(attention),
          lighthouse_(lighthouse),
          table_(make_parameter_table(config)),
          inverse_frequencies_(rope_inverse_frequencies(config)),
          weights_(table_.tensors.size()),
          gradients_(table_.tensors.size()),
          blocks_(config.num_layers) {}

    // Rounds the master weights of one tensor.
    void set_weight(int tensor, const Values& master) {
        weights_[tensor] = master;
        round_to_bf16(weights_[tensor]);
    }
    const Values& gradient(int tensor) const { return gradients_[tensor]; }

    void zero_gradients() {
        for (size_t i = 0; i < gradients_.size(); ++i) {
            gradients_[i].assign(weights_[i].size(), 0.0f);
        }
    }
    // tokens [B, T + 1]. Adds the gradient of loss_weight * mean loss; returns the mean loss.
    double accumulate(const int32_t* tokens, int B, int64_t T, double loss_weight) {
        B_ = B, T_ = T;
        InputsAndTargets columns(tokens, B, T);
        inputs_.swap(columns.inputs), targets_.swap(columns.targets);
        forward();
        return backward(loss_weight);
    }
    // [B, T], of the last accumulate.
    const Values& token_losses() const { return losses_; }
    // Of the last of T tokens, [V].
    Values next_token_logits(const int32_t* tokens, int64_t T) {
        B_ = 1, T_ = T;
        inputs_.assign(tokens, tokens + T);
        forward();
        return product(hidden_.data() + (T - 1) * config_.width, table_.classifier, 1, config_.vocab_size,
                       config_.width);
    }

  private:
    struct Block {
        Values residual_in, attention_rstd, attention_norm_out, qkv, lse, attention;
        Values residual_mid, ffn_rstd, ffn_norm_out, gate_up, swiglu;
        LighthouseState<float> lighthouse;
    };

    int64_t rows() const { return B_ * T_; }
    bool uses_lighthouse(int l) const {
        return attention_ == AttentionMode::lighthouse && lighthouse_.applies_to(l, config_.num_layers);
    }
    LighthouseGeometry geometry() const { return make_lighthouse_geometry(T_, lighthouse_); }

    // in [M, K] times weight [N, K]^T, rounded.
    Values product(const float* in, int tensor, int64_t M, int64_t N, int64_t K) const {
        return sum_with_product(Values(M * N, 0.0f), in, tensor, M, N, K);
    }
    // The same plus x [M, N], rounded once.
    Values sum_with_product(Values x, const float* in, int tensor, int64_t M, int64_t N, int64_t K) const {
        gemm_forward(x.data(), in, weights_[tensor].data(), M, N, K, true);
        round_to_bf16(x);
        return x;
    }
    // dout [M, N] times weight [N, K], rounded; and the weight's gradient.
    Values product_backward(const Values& dout, const Values& in, int tensor, int64_t M, int64_t N, int64_t K) {
        Values din(M * K);
        gemm_backward_weight(gradients_[tensor].data(), dout.data(), in.data(), M, N, K, true);
        gemm_backward_input(din.data(), dout.data(), weights_[tensor].data(), M, N, K, false);
        round_to_bf16(din);
        return din;
    }
    void norm(Values& out, Values& rstd, const Values& x, int tensor) const {
        out.resize(x.size()), rstd.resize(rows());
        rmsnorm_forward(out.data(), rstd.data(), x.data(), weights_[tensor].data(), rows(), config_.width,
                        config_.norm_eps);
        round_to_bf16(out);
    }
    // dresidual_ (in place) gains what comes through the norm.
    void norm_backward(const Values& dout, const Values& x, const Values& rstd, int tensor, bool first) {
        rmsnorm_backward(dresidual_.data(), gradients_[tensor].data(), first ? nullptr : dresidual_.data(), dout.data(),
                         x.data(), weights_[tensor].data(), rstd.data(), rows(), config_.width);
        round_to_bf16(dresidual_);
    }

    void forward() {
        const int C = config_.width, F = config_.ffn_width;
        Values x(rows() * C);
        embedding_forward(x.data(), inputs_.data(), weights_[table_.embedding].data(), rows(), C);
        for (int l = 0; l < config_.num_layers; ++l) {
            Block& block = blocks_[l];
            const LayerParameters& p = table_.layers[l];
            block.residual_in = x;
            norm(block.attention_norm_out, block.attention_rstd, x, p.attention_norm);
            block.qkv = product(block.attention_norm_out.data(), p.qkv, rows(), config_.qkv_width(), C);
            rope_forward(block.qkv.data(), B_, T_, config_.num_heads + config_.num_kv_heads, config_.qkv_width(),
                         config_.head_dim, inverse_frequencies_, 0);
            round_to_bf16(block.qkv);
            attend(l);
            block.residual_mid =
                sum_with_product(x, block.attention.data(), p.attention_out, rows(), C, config_.attention_width());
            norm(block.ffn_norm_out, block.ffn_rstd, block.residual_mid, p.ffn_norm);
            block.gate_up = product(block.ffn_norm_out.data(), p.gate_up, rows(), 2 * F, C);
            block.swiglu.resize(rows() * F);
            swiglu_forward(block.swiglu.data(), block.gate_up.data(), rows(), F);
            round_to_bf16(block.swiglu);
            x = sum_with_product(block.residual_mid, block.swiglu.data(), p.down, rows(), C, F);
        }
        final_residual_ = x;
        norm(hidden_, final_rstd_, x, table_.final_norm);
    }

    double backward(double loss_weight) {
        const int C = config_.width, F = config_.ffn_width;
        const int64_t V = config_.vocab_size;
        losses_.resize(rows());
        Values logits = product(hidden_.data(), table_.classifier, rows(), V, C);
        cross_entropy_forward_backward(losses_.data(), logits.data(), targets_.data(), rows(), V, V,
                                       loss_weight / (double)rows(), true);
        round_to_bf16(logits);
        dresidual_.assign(rows() * C, 0.0f);
        norm_backward(product_backward(logits, hidden_, table_.classifier, rows(), V, C), final_residual_, final_rstd_,
                      table_.final_norm, true);
        for (int l = config_.num_layers - 1; l >= 0; --l) {
            const Block& block = blocks_[l];
            const LayerParameters& p = table_.layers[l];
            const Values dswiglu = product_backward(dresidual_, block.swiglu, p.down, rows(), C, F);
            Values dgate_up(rows() * 2 * F);
            swiglu_backward(dgate_up.data(), dswiglu.data(), block.gate_up.data(), rows(), F);
            round_to_bf16(dgate_up);
            norm_backward(product_backward(dgate_up, block.ffn_norm_out, p.gate_up, rows(), 2 * F, C),
                          block.residual_mid, block.ffn_rstd, p.ffn_norm, false);
            Values dqkv = attend_backward(l, product_backward(dresidual_, block.attention, p.attention_out, rows(), C,
                                                              config_.attention_width()));
            rope_backward(dqkv.data(), B_, T_, config_.num_heads + config_.num_kv_heads, config_.qkv_width(),
                          config_.head_dim, inverse_frequencies_, 0);
            round_to_bf16(dqkv);
            norm_backward(product_backward(dqkv, block.attention_norm_out, p.qkv, rows(), config_.qkv_width(), C),
                          block.residual_in, block.attention_rstd, p.attention_norm, false);
        }
        embedding_backward(gradients_[table_.embedding].data(), dresidual_.data(), inputs_.data(), rows(), C);
        return mean_loss(losses_.data(), rows());
    }

    // ---- attention
    AttentionShape attention_shape() const {
        AttentionShape shape;
        shape.B = B_, shape.H = config_.num_heads, shape.Hkv = config_.num_kv_heads, shape.D = config_.head_dim;
        shape.Tq = shape.Tk = T_;
        shape.scale = 1.0 / std::sqrt((double)config_.head_dim);
        return shape;
    }
    template <class Element>
    View<Element> heads(Element* rows) const {
        const int64_t width = config_.attention_width();
        return {rows, T_ * width, width, config_.head_dim};
    }
    void attend(int l) {
        Block& block = blocks_[l];
        const AttentionShape shape = attention_shape();
        const QkvViews<const float> in(block.qkv.data(), config_, T_);
        block.attention.resize(rows() * config_.attention_width());
        const View<float> out = heads(block.attention.data());
        if (uses_lighthouse(l)) {
            lighthouse_forward<float>(out, block.lighthouse, in.q, in.k, in.v, B_, shape.H, shape.Hkv, shape.D,
                                      shape.scale, lighthouse_, geometry());
            for (Values* gathered : {&block.lighthouse.q, &block.lighthouse.k, &block.lighthouse.v}) {
                round_to_bf16(*gathered);
            }
            round_to_bf16(block.lighthouse.out);
        } else {
            block.lse.resize(rows() * config_.num_heads);
            attention_forward<float>(out, block.lse.data(), in.q, in.k, in.v, shape);
        }
        round_to_bf16(block.attention);
    }
    Values attend_backward(int l, const Values& dattention) {
        const Block& block = blocks_[l];
        const AttentionShape shape = attention_shape();
        Values dqkv(rows() * config_.qkv_width());
        const QkvViews<float> din(dqkv.data(), config_, T_);
        const View<const float> dout = heads(dattention.data());
        if (uses_lighthouse(l)) {
            lighthouse_backward<float>(din.q, din.k, din.v, dout, block.lighthouse, B_, shape.H, shape.Hkv, shape.D,
                                       shape.scale, geometry());
        } else {
            const QkvViews<const float> in(block.qkv.data(), config_, T_);
            attention_backward<float>(din.q, din.k, din.v, dout, in.q, in.k, in.v, heads(block.attention.data()),
                                      block.lse.data(), shape);
        }
        round_to_bf16(dqkv);
        return dqkv;
    }

    ModelConfig config_;
    AttentionMode attention_;
    LighthouseConfig lighthouse_;
    ParameterTable table_;
    std::vector<double> inverse_frequencies_;
    std::vector<Values> weights_, gradients_;
    std::vector<Block> blocks_;
    int B_ = 0;
    int64_t T_ = 0;
    std::vector<int32_t> inputs_, targets_;
    Values final_residual_, final_rstd_, hidden_, losses_, dresidual_;
};

}  // namespace reference
