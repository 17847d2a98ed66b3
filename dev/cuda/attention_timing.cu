// attention_timing.cu: times what flash_attention.cuh runs on this GPU, on shapes that come a line at a time, so that a
// script can time a peer between them (dev/bench/attention.py). Packed qkv operands, as the trainer has them.
//   in   pass B H Hkv D T causal runs [spread]   pass: forward, backward or deterministic; T queries and T keys;
//                                                spread: standard deviation of the scores, 1 if it is left out
//   out  ok ms ms ms ...                         one for each run, after one that is not timed
//   in   results B H Hkv D T causal FOLDER
//   out  ok                                      of bf16 operands in the folder's files qkv [B, T, H + 2 Hkv, D] and
//                                                dout [B, T, H, D] it has left out and dqkv there, shaped as dout and
//                                                qkv
//   out  error and a sentence                    where something is wrong
// An empty line or the end of the input ends the program; operands of the last shape are kept. Before each run the GPU
// is held busy until its kernels are queued, so that times are the GPU's alone.
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>

#include "flash_attention_cases.cuh"
#include "llmc/flash_attention.cuh"

static void read_file(const std::string& path, DeviceBuffer<bf16>& buffer) {
    std::vector<bf16> values(buffer.size());
    std::ifstream file(path, std::ios::binary);
    file.read(reinterpret_cast<char*>(values.data()), (std::streamsize)(values.size() * sizeof(bf16)));
    CHECK(file && file.peek() == EOF, "%s: not a file of %lld bf16 values", path.c_str(), (long long)buffer.size());
    buffer.upload(values);
}
static void write_file(const std::string& path, const DeviceBuffer<bf16>& buffer) {
    const std::vector<bf16> values = buffer.download();
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(values.data()), (std::streamsize)(values.size() * sizeof(bf16)));
    CHECK(file.flush(), "%s: cannot be written", path.c_str());
}

// The operands and results of a shape.
struct TimedShape {
    AttentionShape shape;
    float spread;
    DeviceBuffer<bf16> qkv, gradients, out, dout;
    DeviceBuffer<float> lse;
    DeviceBuffer<char> scratch;
    PackedViews in, d;

    explicit TimedShape(const AttentionShape& s, float spread = 1.0f)
        : shape(s),
          spread(spread),
          qkv(packed_elements(s)),
          gradients(packed_elements(s)),
          out(s.B * s.Tq * s.H * s.D),
          dout(s.B * s.Tq * s.H * s.D),
          lse((int64_t)s.B * s.H * s.Tq),
          scratch((int64_t)std::max(flash_attention_backward_scratch_bytes(s, false),
                                    flash_attention_backward_scratch_bytes(s, true))),
          in(packed_views(qkv, s)),
          d(packed_views(gradients, s)) {}
    void fill_random() {
        qkv.fill_random(1, std::sqrt(spread));  // scores are products of two of these
        dout.fill_random(2);
        forward(nullptr);  // the backward's out and lse
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    // Leaves what the folder's operands give there, as the head of this file says.
    void leave_results(const std::string& folder, cudaStream_t stream) {
        read_file(folder + "/qkv", qkv);
        read_file(folder + "/dout", dout);
        out.poison();
        gradients.poison();
        CUDA_CHECK(cudaDeviceSynchronize());
        forward(stream);
        backward(false, stream);
        CUDA_CHECK(cudaStreamSynchronize(stream));
        write_file(folder + "/out", out);
        write_file(folder + "/dqkv", gradients);
    }
    HeadView<bf16> rows(bf16* data) const {
        return HeadView<bf16>(data, shape.Tq * shape.H * shape.D, (int64_t)shape.H * shape.D, shape.D);
    }
    void forward(cudaStream_t stream) { flash_attention_forward(rows(out), lse, in.q, in.k, in.v, shape, stream); }
    void backward(bool deterministic, cudaStream_t stream) {
        flash_attention_backward(d.q, d.k, d.v, rows(dout), in.q, in.k, in.v, rows(out), lse, scratch, shape,
                                 deterministic, stream);
    }
};

// About 1 ms, as long as dev/bench/attention.py holds the GPU for its peers, whose launches take that long from Python:
// at the power limit a kernel is the faster the longer the GPU has rested.
constexpr int64_t HOLD_CLOCKS = 2000000;

static bool same(const TimedShape& timed, const AttentionShape& b, float spread) {
    const AttentionShape& a = timed.shape;
    return timed.spread == spread && a.B == b.B && a.H == b.H && a.Hkv == b.Hkv && a.D == b.D && a.Tq == b.Tq &&
           a.causal == b.causal;
}

int main() {
    try {
        cudaStream_t stream;
        cudaEvent_t begin, end;
        CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CUDA_CHECK(cudaEventCreate(&begin));
        CUDA_CHECK(cudaEventCreate(&end));
        std::unique_ptr<TimedShape> timed;
        for (std::string line; std::getline(std::cin, line) && !line.empty();) {
            try {
                std::istringstream words(line);
                std::string pass, folder;
                AttentionShape s;
                int causal, runs = 1;
                float spread = 1.0f;
                words >> pass >> s.B >> s.H >> s.Hkv >> s.D >> s.Tq >> causal;
                const bool wants_results = pass == "results";
                wants_results ? words >> folder : words >> runs;
                const bool is_whole = !words.fail();
                if (is_whole && !wants_results && !words.eof()) {
                    words >> spread;
                }
                CHECK(is_whole && !words.fail() && runs >= 1 && spread > 0.0f &&
                          (wants_results || pass == "forward" || pass == "backward" || pass == "deterministic"),
                      "'%s' is not: forward|backward|deterministic B H Hkv D T causal runs [spread], or results B H "
                      "Hkv D T causal FOLDER",
                      line.c_str());
                s.Tk = s.Tq, s.causal = causal != 0, s.scale = 1.0f / std::sqrt((float)s.D);
                if (wants_results) {
                    timed.reset();  // before the next shape's memory is taken
                    TimedShape(s).leave_results(folder, stream);
                    std::cout << "ok" << std::endl;
                    continue;
                }
                if (timed == nullptr || !same(*timed, s, spread)) {
                    timed.reset();
                    auto next = std::make_unique<TimedShape>(s, spread);
                    next->fill_random();
                    timed = std::move(next);
                }
                std::string answer = "ok";
                for (int run = -1; run < runs; ++run) {
                    delay_kernel<<<1, 1, 0, stream>>>(HOLD_CLOCKS);
                    CUDA_CHECK_LAUNCH();
                    CUDA_CHECK(cudaEventRecord(begin, stream));
                    if (pass == "forward") {
                        timed->forward(stream);
                    } else {
                        timed->backward(pass == "deterministic", stream);
                    }
                    CUDA_CHECK(cudaEventRecord(end, stream));
                    CUDA_CHECK(cudaEventSynchronize(end));
                    float ms;
                    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
                    answer += run < 0 ? "" : format_string(" %.6f", ms);
                }
                std::cout << answer << std::endl;
            } catch (const Error& error) {
                std::cout << "error " << error.what() << std::endl;
            }
        }
        return 0;
    } catch (const Error& error) {
        std::fprintf(stderr, "attention_timing: %s\n", error.what());
        return 2;
    }
}
