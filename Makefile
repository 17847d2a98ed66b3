# make help lists the targets. Everything is found, nothing is configured: see the lines `make` prints first.

CXX       ?= g++
NVCC      ?= $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
BUILD     := build
WARNINGS  := -Wall -Wextra -Werror
CXXFLAGS  := -std=c++17 -O3 -march=native -g -fopenmp -I. $(WARNINGS) -MMD -MP
LDLIBS    := -lm

# The GPU's architecture when there is a GPU, else a binary for all of sm_80 and up (sm_90a: Hopper's own kernels).
# make ARCH=90a or ARCH="80 90a" overrides.
DETECTED  := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | tr -d . | sed 's/^90$$/90a/')
ARCH      ?= $(or $(DETECTED),80 90a)
GENCODE   := $(foreach a,$(ARCH),-gencode arch=compute_$(a),code=sm_$(a))
ifneq (,$(filter 80,$(ARCH)))
GENCODE   += -gencode arch=compute_80,code=compute_80
endif
ifneq (,$(filter 90a,$(ARCH)))
GENCODE   += -DLLMC_HOPPER
endif
NVCCFLAGS := -std=c++17 -O3 -lineinfo -I. $(GENCODE) -Xcompiler -fopenmp,-Wall,-Wextra,-Wno-unused-parameter,-march=native \
             --expt-relaxed-constexpr -Werror all-warnings -Xptxas -warn-spills -MMD -MP
CUDALIBS  := -lcublasLt -lcublas

HOST_TESTS := $(patsubst dev/test/%.cpp,$(BUILD)/%,$(wildcard dev/test/test_*.cpp))
DEV_KERNELS := $(patsubst dev/cuda/%.cu,$(BUILD)/dev/%,$(wildcard dev/cuda/*.cu))

.DEFAULT_GOAL := all

all: train_gpt_cpu  ## everything this machine can build
ifneq ($(NVCC),)
all: train_gpt test_gpt
endif

train_gpt_cpu: train_gpt.cpp  ## the CPU trainer
	$(CXX) $(CXXFLAGS) -MF $(BUILD)/train_gpt_cpu.d -MT $@ $< -o $@ $(LDLIBS)

train_gpt: train_gpt.cu  ## the GPU trainer
	$(NVCC) $(NVCCFLAGS) -MF $(BUILD)/train_gpt.d $< -o $@ $(CUDALIBS)

test_gpt: test_gpt.cu  ## the GPU model's test against the CPU reference
	$(NVCC) $(NVCCFLAGS) -MF $(BUILD)/test_gpt.d $< -o $@ $(CUDALIBS)

$(BUILD)/dev/%: dev/cuda/%.cu
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) -MF $@.d -MT $@ $< -o $@ $(CUDALIBS)

$(BUILD)/test_%: dev/test/test_%.cpp
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -MF $@.d -MT $@ $< -o $@ -lgtest -lgtest_main -lpthread $(LDLIBS)

-include $(wildcard $(BUILD)/*.d $(BUILD)/dev/*.d)
