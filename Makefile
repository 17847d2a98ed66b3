# `make` builds what this machine can build; `make help` lists the targets. Nothing is configured by hand: compilers, the
# GPU's architecture and libraries are found, and the first lines printed say what was found and what is left out.
#   make ARCH="80 90a"      CUDA architectures other than this machine's GPU (without a GPU: 80 and 90a)
#   make HOST_ARCH=x86-64-v3  host code that also runs on other machines than this one
#   make train_gpt DEBUG=1  a wait after every launch, an error where a barrier of a kernel hangs, scratch memory poisoned
#                           with NaN (make debug builds the same beside the usual programs)
#   make STRICT=1           the compilers' warnings are errors, as in continuous integration
# What is built already stays as it is when one of these changes: make clean first, or add -B.

CXX       ?= g++
NVCC      ?= $(or $(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc))
HOST_ARCH ?= native
BUILD     ?= build
BIN       ?=

# ---- what this machine has -------------------------------------------------------------------------------------------
GPU_ARCH  := $(shell bash scripts/gpu_capabilities.sh | sort -u | tr -d . | sed 's/^90$$/90a/')
ARCH      ?= $(or $(GPU_ARCH),80 90a)
# Between processes on several GPUs; MPI=no or NCCL=no leaves one out. PyTorch's copy of NCCL: NCCL=FOLDER with include
# and lib in it.
HAVE_MPI  := $(if $(filter no,$(MPI)),,$(shell command -v mpicxx 2>/dev/null))
HAVE_NCCL := $(if $(filter no,$(NCCL)),,$(firstword $(wildcard $(addsuffix /nccl.h,$(if $(NCCL),$(NCCL)/include,\
             $(dir $(NVCC))../include /usr/include /usr/local/include)))))
MPI_LINE  := $(if $(HAVE_MPI),$(shell mpicxx --showme 2>/dev/null || mpicxx -show))
MPI_FLAGS := $(if $(HAVE_MPI),-DLLMC_MPI $(filter -I%,$(MPI_LINE)))
MPI_LIBS  := $(filter-out -lmpi_cxx -lmpicxx,$(filter -L% -l%,$(MPI_LINE)))
NCCL_LIB_FOLDERS := $(wildcard $(addprefix $(dir $(HAVE_NCCL))../,lib lib64))
NCCL_FLAGS := $(if $(HAVE_NCCL),-DLLMC_NCCL -I$(dir $(HAVE_NCCL)))
NCCL_LIBS := $(if $(HAVE_NCCL),$(addprefix -L,$(NCCL_LIB_FOLDERS)) $(addprefix -Xlinker -rpath=,$(NCCL_LIB_FOLDERS)) -lnccl)

# What ptxas reports; with -v also registers, and where it serialises products that should overlap (C75..).
PTXAS ?= -warn-spills

# ---- flags -----------------------------------------------------------------------------------------------------------
OPTIMIZE  := $(if $(DEBUG),-O1 -g -DLLMC_DEBUG,-O3)
# fp-contract is left on: fused multiply-adds; no -ffast-math: NaN checks and the reference's arithmetic depend on it.
CXXFLAGS  ?= $(OPTIMIZE) -march=$(HOST_ARCH)
override CXXFLAGS += -std=c++17 -fopenmp -I. -Wall -Wextra $(if $(STRICT),-Werror) -MMD -MP
GENCODE   := $(foreach a,$(ARCH),-gencode arch=compute_$(a),code=sm_$(a))
# PTX of the oldest architecture: what GPUs newer than those listed run.
comma     := ,
GENCODE   += $(if $(filter 80,$(ARCH)),-gencode arch=compute_80$(comma)code=compute_80)
# STRICT concerns the C++ front ends: a spilled register, which ptxas reports, costs speed alone and stays a warning.
NVCCFLAGS := -std=c++17 $(if $(DEBUG),-O1 -DLLMC_DEBUG,-O3) -lineinfo -I. $(GENCODE) $(if $(filter 90a,$(ARCH)),-DLLMC_HOPPER) \
             -Xcompiler -fopenmp,-Wall,-Wextra,-march=$(HOST_ARCH) $(if $(STRICT),-Xcompiler -Werror -Xcudafe --promote_warnings) \
             -Xptxas $(PTXAS) -MMD -MP
# In recipes: an empty command would begin with a flag's minus, by which make ignores that it fails.
CUDA_COMPILER = $(or $(NVCC),$(error no nvcc: install the CUDA toolkit, or name its compiler with make NVCC=PATH))
CUDALIBS  := -lcublasLt

HOST_TESTS  := $(patsubst dev/test/%.cpp,$(BUILD)/%,$(wildcard dev/test/test_*.cpp))
HOST_TOOLS  := $(patsubst dev/test/%.cpp,$(BUILD)/%,$(filter-out $(wildcard dev/test/test_*.cpp dev/test/fuzz_*.cpp),$(wildcard dev/test/*.cpp)))
FUZZERS     := $(patsubst dev/test/%.cpp,$(BUILD)/fuzz/%,$(wildcard dev/test/fuzz_*.cpp))
DEV_KERNELS := $(patsubst dev/cuda/%.cu,$(BUILD)/dev/%,$(wildcard dev/cuda/*.cu))

# make's own rule would build train_gpt from train_gpt.cpp where the one below does not apply.
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := all
.PHONY: all help found cuda dev host_tests fuzzers test check gpu_check bench debug sanitize sass clean

all: found train_gpt_cpu $(if $(NVCC),train_gpt test_gpt)  ## the trainers and test_gpt, as far as this machine can build them

found:  ## what was found on this machine, and what is left out
	@echo "C++ compiler: $(CXX) ($(shell $(CXX) -dumpfullversion 2>/dev/null)), host code for $(HOST_ARCH)"
	@echo "CUDA: $(if $(NVCC),$(NVCC)$(comma) for sm_$(subst $() $(), and sm_,$(strip $(ARCH)))$(if $(GPU_ARCH),: this machine's GPU,: no GPU of compute capability 8.0 or more here),no nvcc: train_gpt and test_gpt are left out; train_gpt_cpu is the trainer)"
	@echo "MPI: $(if $(HAVE_MPI),$(HAVE_MPI),not found); NCCL: $(if $(HAVE_NCCL),$(firstword $(HAVE_NCCL)),not found); several GPUs need NCCL, and MPI or scripts/spawn_ranks.sh"

help:  ## this list
	@grep -hE '^(\$$\(BIN\))?[a-z_]+:.*## ' Makefile | sed 's/^$$(BIN)//; s/:.*## /\t/' | expand -t 16

$(BIN)train_gpt_cpu: train_gpt.cpp $(BUILD)/train_gpt_cpu.d | $(BUILD)  ## the CPU trainer
	$(CXX) $(CXXFLAGS) -MF $(BUILD)/train_gpt_cpu.d -MT $@ $< -o $@

$(BIN)train_gpt: train_gpt.cu $(BUILD)/train_gpt.d | $(BUILD)  ## the GPU trainer
	$(CUDA_COMPILER) $(NVCCFLAGS) $(MPI_FLAGS) $(NCCL_FLAGS) -MF $(BUILD)/train_gpt.d -MT $@ $< -o $@ $(CUDALIBS) $(MPI_LIBS) $(NCCL_LIBS)

$(BIN)test_gpt: test_gpt.cu $(BUILD)/test_gpt.d | $(BUILD)  ## the GPU model's test against the CPU reference
	$(CUDA_COMPILER) $(NVCCFLAGS) -MF $(BUILD)/test_gpt.d -MT $@ $< -o $@ $(CUDALIBS)

# What the programs at the top depend on is known as long as these are there; without them they are built again.
$(addprefix $(BUILD)/,$(addsuffix .d,train_gpt_cpu train_gpt test_gpt)): ;

$(BUILD) $(BUILD)/dev $(BUILD)/fuzz:
	@mkdir -p $@

$(BUILD)/dev/%: dev/cuda/%.cu | $(BUILD)/dev
	$(CUDA_COMPILER) $(NVCCFLAGS) -MF $@.d -MT $@ $< -o $@ $(CUDALIBS)

$(BUILD)/fuzz/%: dev/test/%.cpp | $(BUILD)/fuzz
	clang++ -std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -I. -MMD -MP -MF $@.d -MT $@ $< -o $@

$(BUILD)/test_%: dev/test/test_%.cpp | $(BUILD)
	$(CXX) $(CXXFLAGS) -MF $@.d -MT $@ $< -o $@ -lgtest -lgtest_main -lpthread

# It compiles a kernel's source, and g++ heeds no pragma against warnings of unknown ones.
$(BUILD)/test_hopper_softmax: override CXXFLAGS += -Wno-unknown-pragmas

# Ranks in processes of their own, also under mpirun.
$(BUILD)/mpi_%: dev/test/mpi_%.cpp | $(BUILD)
	$(CXX) $(CXXFLAGS) $(MPI_FLAGS) -MF $@.d -MT $@ $< -o $@ $(MPI_LIBS) -lpthread

$(filter-out $(BUILD)/mpi_%,$(HOST_TOOLS)): $(BUILD)/%: dev/test/%.cpp | $(BUILD)
	$(CXX) $(CXXFLAGS) -MF $@.d -MT $@ $< -o $@

cuda: train_gpt test_gpt dev  ## every CUDA program (needs nvcc, no GPU)

dev: $(DEV_KERNELS)  ## the isolated kernel variants of dev/cuda, in build/dev

host_tests: $(HOST_TESTS) $(HOST_TOOLS)  ## the unit tests and test programs that need no GPU

fuzzers: $(FUZZERS)  ## the parsers under libFuzzer with address and undefined-behaviour sanitizers (needs clang)

test:  ## everything this machine can test (scripts/test.sh)
	bash scripts/test.sh

check: test  ## the same

gpu_check:  ## all that needs one GPU but dev/test/e2e_ranks.sh (scripts/gpu_check.sh)
	bash scripts/gpu_check.sh

bench: train_gpt dev  ## compare with PyTorch on this machine's GPU (needs Python with torch); tables and plots in build/bench
	for bench in attention lighthouse step; do python3 dev/bench/$$bench.py --out $(BUILD)/bench || exit 1; done

debug:  ## trainers that wait after every launch, end a kernel that hangs and poison scratch memory, in build/debug
	$(MAKE) DEBUG=1 BUILD=$(BUILD)/debug BIN=$(BUILD)/debug/ $(addprefix $(BUILD)/debug/,train_gpt_cpu $(if $(NVCC),train_gpt test_gpt))

sanitize:  ## unit tests of file formats, flags, training loop and sampling with address and undefined-behaviour sanitizers
	$(MAKE) BUILD=$(BUILD)/sanitize CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
	    $(addprefix $(BUILD)/sanitize/,$(SANITIZED_TESTS))
	for t in $(SANITIZED_TESTS); do $(BUILD)/sanitize/$$t --gtest_brief=1 || exit 1; done
SANITIZED_TESTS := $(filter test_tokens test_tokenizer test_train_loop% test_metrics test_safetensors test_hf_config test_checkpoint% test_flags test_sampler test_random,$(notdir $(HOST_TESTS)))

sass: train_gpt  ## the machine code of the trainer's kernels, in build/train_gpt.sass (needs cuobjdump)
	$$(bash scripts/install_dependencies.sh cuobjdump) --dump-sass train_gpt > $(BUILD)/train_gpt.sass && wc -l $(BUILD)/train_gpt.sass

clean:  ## remove everything that was built
	rm -rf $(BUILD) train_gpt train_gpt_cpu test_gpt

-include $(wildcard $(BUILD)/*.d $(BUILD)/dev/*.d $(BUILD)/fuzz/*.d)
