// gemm.cuh: the three matrix products of a linear layer, by cuBLASLt: bf16 in, float32 accumulation.
//   forward          out [M, N]     = in [M, K] weight [N, K]^T (+ addend [M, N])
//   backward_input   din [M, K]     = dout [M, N] weight [N, K]
//   backward_weight  dweight [N, K] = dout [M, N]^T in [M, K]       float32
// All matrices are row-major without padding; M = rows = B * T, any up to several million; N and K multiples of 8.
// cuBLASLt is column-major: a row-major [R, S] matrix is its S x R one, so each product is asked for transposed. Cost:
// 2 M N K floating-point operations each. Reference: reference/gemm.h. Checks and timings: dev/cuda/gemm.cu.
#pragma once
#include <cublasLt.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

#include "cuda_common.cuh"

// ---- constants ---------------------------------------------------------------------------------
constexpr size_t GEMM_WORKSPACE_BYTES = (size_t)32 << 20;  // what NVIDIA recommends for Hopper
constexpr int GEMM_SEARCH_CANDIDATES = 12;                 // of the heuristic's list, timed by a search
constexpr int GEMM_SEARCH_REPEATS = 3;                     // timings of each at most; the fastest counts
constexpr float GEMM_SEARCH_MS = 5.0f;                     // no further repeat after so long
constexpr float GEMM_SEARCH_ALPHA = 1e-30f;  // not 0, at which a kernel may skip the work that is to be timed

// ---- errors ------------------------------------------------------------------------------------
inline void cublas_check(cublasStatus_t status, const char* statement, const char* file, int line) {
    CHECK(status == CUBLAS_STATUS_SUCCESS, "cuBLAS error: %s from %s at %s:%d", cublasLtGetStatusString(status),
          statement, file, line);
}
#define CUBLAS_CHECK(statement) cublas_check((statement), #statement, __FILE__, __LINE__)

// ---- the class ---------------------------------------------------------------------------------
enum class GemmOperation { forward, backward_input, backward_weight };

class Gemm {
  public:
    // workspace: device memory that outlives this object, of workspace_bytes (GEMM_WORKSPACE_BYTES serves), 256-byte
    // aligned; products that use it must be on one stream.
    Gemm(void* workspace, size_t workspace_bytes) : workspace_(workspace), workspace_bytes_(workspace_bytes) {
        CUBLAS_CHECK(cublasLtCreate(&handle_));
        CUDA_CHECK(cudaEventCreate(&begin_));
        CUDA_CHECK(cudaEventCreate(&end_));
    }
    ~Gemm() {
        cudaEventDestroy(end_);
        cudaEventDestroy(begin_);
        cublasLtDestroy(handle_);
    }
    Gemm(const Gemm&) = delete;
    Gemm& operator=(const Gemm&) = delete;

    // While on, the first product of each kind and shape times the best GEMM_SEARCH_CANDIDATES algorithms of cuBLASLt's
    // list on its own operands, then runs with the fastest, which is kept. The result is that of one product: what is
    // added to itself is timed with a factor GEMM_SEARCH_ALPHA, which leaves it as it is. The host waits for the
    // device. While off (the start), a product that was not searched for takes the first of the list, which depends on
    // nothing but the shape: the choice of a deterministic run, as the search's depends on the clock.
    void set_search(bool on) { search_ = on; }

    // out (=) [M, N] = in [M, K] weight [N, K]^T plus addend [M, N], unless nullptr, rounded once. addend may be out.
    void forward(bf16* out, const bf16* in, const bf16* weight, const bf16* addend, int64_t M, int64_t N, int64_t K,
                 cudaStream_t stream) {
        NvtxRange range("gemm_forward");
        multiply({GemmOperation::forward, M, N, K, added(addend, out)}, out, addend, weight, in, stream);
    }
    // din (=) [M, K] = dout [M, N] weight [N, K].
    void backward_input(bf16* din, const bf16* dout, const bf16* weight, int64_t M, int64_t N, int64_t K,
                        cudaStream_t stream) {
        NvtxRange range("gemm_backward_input");
        multiply({GemmOperation::backward_input, M, N, K, Addend::none}, din, nullptr, weight, dout, stream);
    }
    // dweight (= or, with accumulate, +=) [N, K], float32 = dout [M, N]^T in [M, K].
    void backward_weight(float* dweight, const bf16* dout, const bf16* in, int64_t M, int64_t N, int64_t K,
                         bool accumulate, cudaStream_t stream) {
        NvtxRange range("gemm_backward_weight");
        const float* const addend = accumulate ? dweight : nullptr;
        multiply({GemmOperation::backward_weight, M, N, K, added(addend, dweight)}, dweight, addend, in, dout, stream);
    }

  private:
    // What is added to a product: nothing, what its result replaces, or another matrix.
    enum class Addend { none, result, other };
    static Addend added(const void* addend, const void* result) {
        return addend == nullptr ? Addend::none : addend == result ? Addend::result : Addend::other;
    }
    struct Problem {
        GemmOperation operation;
        int64_t M, N, K;
        Addend addend;
    };
    // c: the addend, or nullptr.
    struct Operands {
        void* d;
        const void *c, *a, *b;
    };

    // cuBLASLt's description of one problem (column-major: d [rows, cols] = op(a) op(b) + c, all ld = rows) and the
    // algorithm chosen for it.
    struct Product {
        cublasLtMatmulDesc_t operation = nullptr;
        cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
        cublasLtMatmulAlgo_t algorithm;
        bool searched = false;

        Product(const Problem& p) {
            CUBLAS_CHECK(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
            const cublasOperation_t transpose = CUBLAS_OP_T;
            switch (p.operation) {
                case GemmOperation::forward:
                    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &transpose,
                                                                sizeof transpose));
                    make_layouts(p.K, p.N, p.K, p.M, p.N, p.M, CUDA_R_16BF);
                    break;
                case GemmOperation::backward_input:
                    make_layouts(p.K, p.N, p.N, p.M, p.K, p.M, CUDA_R_16BF);
                    break;
                case GemmOperation::backward_weight:
                    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSB, &transpose,
                                                                sizeof transpose));
                    make_layouts(p.K, p.M, p.N, p.M, p.K, p.N, CUDA_R_32F);
                    break;
            }
        }
        ~Product() {
            cublasLtMatrixLayoutDestroy(d);
            cublasLtMatrixLayoutDestroy(b);
            cublasLtMatrixLayoutDestroy(a);
            cublasLtMatmulDescDestroy(operation);
        }
        Product(const Product&) = delete;
        Product& operator=(const Product&) = delete;

      private:
        void make_layouts(int64_t a_rows, int64_t a_cols, int64_t b_rows, int64_t b_cols, int64_t d_rows,
                          int64_t d_cols, cudaDataType_t d_type) {
            CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&a, CUDA_R_16BF, a_rows, a_cols, a_rows));
            CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&b, CUDA_R_16BF, b_rows, b_cols, b_rows));
            CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&d, d_type, d_rows, d_cols, d_rows));
        }
    };

    // The problem and the alignments of d and c, a, b.
    using Key = std::tuple<GemmOperation, int64_t, int64_t, int64_t, Addend, uint32_t, uint32_t, uint32_t>;

    void multiply(const Problem& p, void* d, const void* c, const void* a, const void* b, cudaStream_t stream) {
        const Operands operands{d, c, a, b};
        CHECK(p.M >= 1 && p.N >= 8 && p.K >= 8 && p.N % 8 == 0 && p.K % 8 == 0,
              "matrix product of M %lld, N %lld, K %lld: N and K must be multiples of 8 and M positive", (long long)p.M,
              (long long)p.N, (long long)p.K);
        const uint32_t d_alignment = std::min(alignment(d), c != nullptr ? alignment(c) : alignment(d));
        const Key key{p.operation, p.M, p.N, p.K, p.addend, d_alignment, alignment(a), alignment(b)};
        auto found = products_.find(key);
        const bool is_new = found == products_.end();
        if (is_new || (search_ && !found->second.searched)) {
            found = is_new ? products_.try_emplace(key, p).first : found;
            try {
                choose_algorithm(found->second, p, operands, d_alignment, stream);
            } catch (...) {
                products_.erase(found);
                throw;
            }
        }
        run(found->second, found->second.algorithm, 1.0f, operands, stream);
    }

    void run(const Product& product, const cublasLtMatmulAlgo_t& algorithm, float alpha, const Operands& x,
             cudaStream_t stream) {
        const float beta = x.c != nullptr ? 1.0f : 0.0f;
        CUBLAS_CHECK(cublasLtMatmul(handle_, product.operation, &alpha, x.a, product.a, x.b, product.b, &beta,
                                    x.c != nullptr ? x.c : x.d, product.d, x.d, product.d, &algorithm, workspace_,
                                    workspace_bytes_, stream));
    }

    void choose_algorithm(Product& product, const Problem& p, const Operands& operands, uint32_t d_alignment,
                          cudaStream_t stream) {
        const std::vector<cublasLtMatmulHeuristicResult_t> candidates =
            list_algorithms(product, p, d_alignment, alignment(operands.a), alignment(operands.b));
        product.algorithm = candidates[0].algo;
        product.searched = search_;
        if (!search_) {
            return;
        }
        float best_ms = INFINITY;
        for (const cublasLtMatmulHeuristicResult_t& candidate : candidates) {
            const float ms = time_algorithm(product, candidate.algo, p.addend, operands, stream);
            if (ms < best_ms) {
                best_ms = ms;
                product.algorithm = candidate.algo;
            }
        }
    }

    // cuBLASLt's algorithms for the product, best first by its estimate; at least one, or an error.
    std::vector<cublasLtMatmulHeuristicResult_t> list_algorithms(const Product& product, const Problem& p,
                                                                 uint32_t d_alignment, uint32_t a_alignment,
                                                                 uint32_t b_alignment) {
        cublasLtMatmulPreference_t preference;
        CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
        auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
            CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
        };
        set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes_);
        // Splits of the sum are added in float32, never in bf16.
        set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (uint32_t)CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
        set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, a_alignment);
        set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, b_alignment);
        set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, d_alignment);
        set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, d_alignment);
        std::vector<cublasLtMatmulHeuristicResult_t> results(search_ ? GEMM_SEARCH_CANDIDATES : 1);
        int num_results = 0;
        const cublasStatus_t status =
            cublasLtMatmulAlgoGetHeuristic(handle_, product.operation, product.a, product.b, product.d, product.d,
                                           preference, (int)results.size(), results.data(), &num_results);
        cublasLtMatmulPreferenceDestroy(preference);
        CHECK(status == CUBLAS_STATUS_SUCCESS && num_results > 0,
              "cuBLASLt has no algorithm for a bf16 product of M %lld, N %lld, K %lld on this GPU (%s)", (long long)p.M,
              (long long)p.N, (long long)p.K, cublasLtGetStatusString(status));
        results.resize(num_results);
        return results;
    }

    // Milliseconds of the fastest of some runs; infinity when the algorithm refuses.
    float time_algorithm(const Product& product, const cublasLtMatmulAlgo_t& algorithm, Addend addend,
                         const Operands& operands, cudaStream_t stream) {
        const float alpha = addend == Addend::result ? GEMM_SEARCH_ALPHA : 1.0f;
        float best_ms = INFINITY, total_ms = 0.0f;
        try {
            run(product, algorithm, alpha, operands, stream);  // loads the kernel
            for (int i = 0; i < GEMM_SEARCH_REPEATS && total_ms < GEMM_SEARCH_MS; ++i) {
                CUDA_CHECK(cudaEventRecord(begin_, stream));
                run(product, algorithm, alpha, operands, stream);
                CUDA_CHECK(cudaEventRecord(end_, stream));
                CUDA_CHECK(cudaEventSynchronize(end_));
                float ms;
                CUDA_CHECK(cudaEventElapsedTime(&ms, begin_, end_));
                best_ms = std::min(best_ms, ms), total_ms += ms;
            }
        } catch (const Error&) {
            return INFINITY;
        }
        return best_ms;
    }

    // The largest power of two up to 256 that divides the address.
    static uint32_t alignment(const void* address) {
        const uintptr_t value = (uintptr_t)address | 256;
        return (uint32_t)(value & (~value + 1));
    }

    cublasLtHandle_t handle_ = nullptr;
    cudaEvent_t begin_ = nullptr, end_ = nullptr;  // of a timing
    void* workspace_;
    size_t workspace_bytes_;
    bool search_ = false;
    std::map<Key, Product> products_;
};
