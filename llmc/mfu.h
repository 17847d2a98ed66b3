// mfu.h: floating-point work of the model, by formula, and the peak of known GPUs: model FLOPs utilisation (MFU).
#pragma once
#include <string>

#include "lighthouse_geometry.h"
#include "model_config.h"

// What the training loop runs on.
struct DeviceInfo {
    std::string name;          // "NVIDIA H200", "CPU, 8 threads"
    bool is_gpu = false;       // train_gpt rather than train_gpt_cpu
    std::string transfers;     // how tensors move between ranks, where there are several
    double peak_tflops = 0.0;  // dense bf16, float32 accumulation; 0: unknown, no MFU
};

// The formula below, in the words of --help.
inline std::string mfu_help_text() {
    return "  MFU = model FLOPs of a step / time of the step / the GPU's peak (dense bf16). Model FLOPs of one "
           "sequence:\n"
           "    matrices   6 N T        N: elements of all matrices, the classifier too (tied or not), not the "
           "embedding\n"
           "    attention  3.5 x 2 T^2 D H a layer: scores and values 4 T^2 D H, halved by the causal mask, and 2.5 "
           "times\n"
           "               that backward (five products instead of two)\n"
           "  A Lighthouse layer counts its work on the S gathered rows, 3.5 x 2 S^2 D H; the terminal and "
           "metrics.jsonl\n"
           "  also give the dense equivalent: the FLOPs of the same step with dense attention in every layer, over "
           "the\n"
           "  same time. Norms, softmax, rotation, the optimizer, selection and recomputation count nothing. A GPU "
           "whose\n"
           "  peak is not known prints no MFU.\n";
}

// Elements of every matrix a token is multiplied with.
inline double matrix_elements(const ModelConfig& m) {
    const double C = m.width, F = m.ffn_width;
    const double block = C * m.qkv_width() + (double)m.attention_width() * C + 3.0 * C * F;
    return m.num_layers * block + (double)m.vocab_size * C;
}

// Forward and backward of causal attention over `length` rows, one sequence, one layer.
inline double attention_flops(const ModelConfig& m, double length) {
    const double forward = 4.0 * length * length * m.head_dim * m.num_heads / 2.0;
    return forward + 2.5 * forward;
}

struct SequenceFlops {
    double work = 0.0;              // of the attention in use
    double dense_equivalent = 0.0;  // with dense attention in every layer
};

// Forward and backward of one sequence of T tokens. Lighthouse needs a legal geometry for T.
inline SequenceFlops sequence_flops(const ModelConfig& m, int64_t T, AttentionMode mode,
                                    const LighthouseConfig& lighthouse) {
    const double matrices = 6.0 * matrix_elements(m) * (double)T;
    const double dense_layer = attention_flops(m, (double)T);
    SequenceFlops flops;
    flops.dense_equivalent = matrices + m.num_layers * dense_layer;
    flops.work = flops.dense_equivalent;
    if (mode == AttentionMode::lighthouse) {
        const int num_lighthouse = lighthouse.num_lighthouse_layers(m.num_layers);
        const double lighthouse_layer = attention_flops(m, (double)make_lighthouse_geometry(T, lighthouse).S);
        flops.work = matrices + (m.num_layers - num_lighthouse) * dense_layer + num_lighthouse * lighthouse_layer;
    }
    return flops;
}

// The peak of a GPU by its full name as the driver reports it, TFLOP/s of dense bf16 products accumulated in float32,
// from NVIDIA's data sheets; 0 when the name is not in the table. Whole names only: an "H100 NVL", a laptop's "RTX
// 4090" or a MIG slice is not the GPU whose name it contains.
inline double gpu_peak_tflops(const std::string& device_name) {
    struct Gpu {
        const char* name;
        double tflops;
    };
    static const Gpu gpus[] = {
        {"GB200", 2500.0},
        {"B200", 2250.0},
        {"GH200 480GB", 989.4},
        {"GH200 144G HBM3e", 989.4},
        {"H200", 989.4},
        {"H200 NVL", 835.5},
        {"H100 80GB HBM3", 989.4},
        {"H100 NVL", 835.5},
        {"H100 PCIe", 756.0},
        {"H800", 989.4},
        {"H20", 148.0},
        {"A100-SXM4-40GB", 312.0},
        {"A100-SXM4-80GB", 312.0},
        {"A100-PCIE-40GB", 312.0},
        {"A100-PCIE-80GB", 312.0},
        {"A100 80GB PCIe", 312.0},
        {"A800-SXM4-80GB", 312.0},
        {"A800 80GB PCIe", 312.0},
        {"A30", 165.0},
        {"A40", 149.7},
        {"A10", 125.0},
        {"L4", 121.0},
        {"L40", 181.05},
        {"L40S", 362.05},
        {"RTX A6000", 154.8},
        {"RTX 6000 Ada Generation", 364.25},
        {"GeForce RTX 3090", 71.0},
        {"GeForce RTX 3090 Ti", 80.0},
        {"GeForce RTX 4090", 165.2},
        {"GeForce RTX 5090", 209.5},
    };
    const std::string vendor = "NVIDIA ";
    const std::string name = device_name.rfind(vendor, 0) == 0 ? device_name.substr(vendor.size()) : device_name;
    for (const Gpu& gpu : gpus) {
        if (name == gpu.name) {
            return gpu.tflops;
        }
    }
    return 0.0;
}
