// micro_batch_graph.cuh: what a micro-batch enqueues, kept as a CUDA graph and replayed: one call of the driver instead
// of some hundreds of launches, which take the host longer than the GPU where steps are short.
#pragma once
#include <cstdint>
#include <optional>

#include "cuda_common.cuh"

// What is baked into the launches, beside what never changes in a model.
struct MicroBatchKey {
    int B;
    int64_t T;
    double loss_weight;
    bool operator==(const MicroBatchKey& o) const { return B == o.B && T == o.T && loss_weight == o.loss_weight; }
};

class MicroBatchGraph {
  public:
    // Whether launches can be captured here. Not with `make debug`, where every launch is waited for; nor by drivers
    // before CUDA 12.3, which do not capture launches that overlap the end of the one before (cudaLaunchAttribute-
    // ProgrammaticStreamSerialization), as the attention backward's are.
    static bool captures_launches() {
#ifdef LLMC_DEBUG
        return false;
#else
        int version = 0;
        CUDA_CHECK(cudaDriverGetVersion(&version));
        return version >= 12030;
#endif
    }

    MicroBatchGraph() = default;
    MicroBatchGraph(const MicroBatchGraph&) = delete;
    MicroBatchGraph& operator=(const MicroBatchGraph&) = delete;
    ~MicroBatchGraph() { reset(); }

    // Enqueues on `stream` what work() enqueues there. The first micro-batch of a key calls it: products look for their
    // algorithms then, and wait. The next one's call is captured instead, and from then on its graph is launched while
    // the key stays the same. work() must enqueue the same for the same key and must not wait for the GPU.
    template <class Work>
    void run(const MicroBatchKey& key, cudaStream_t stream, const Work& work) {
        if (!key_ || !(key == *key_)) {
            reset();
            key_ = key;
            work();
            return;
        }
        if (graph_ == nullptr) {
            capture(stream, work);
        }
        CUDA_CHECK(cudaGraphLaunch(graph_, stream));
        ++num_replays_;
    }
    int64_t num_replays() const { return num_replays_; }

  private:
    void reset() {
        if (graph_ != nullptr) {
            cudaGraphExecDestroy(graph_);  // one that runs is freed when it is over
        }
        graph_ = nullptr;
    }
    // A capture that ends with its scope: an exception may not leave the stream in one.
    struct Capture {
        cudaStream_t stream;
        cudaGraph_t graph = nullptr;
        bool ended = false;

        explicit Capture(cudaStream_t s) : stream(s) {
            // Other threads of this process may allocate meanwhile.
            CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        }
        void end() {
            ended = true;
            CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
        }
        ~Capture() {
            if (!ended) {
                cudaStreamEndCapture(stream, &graph);
            }
            if (graph != nullptr) {
                cudaGraphDestroy(graph);
            }
        }
    };
    template <class Work>
    void capture(cudaStream_t stream, const Work& work) {
        Capture capture(stream);
        work();
        capture.end();
        CUDA_CHECK(cudaGraphInstantiate(&graph_, capture.graph, 0));
    }

    std::optional<MicroBatchKey> key_;
    cudaGraphExec_t graph_ = nullptr;
    int64_t num_replays_ = 0;
};
