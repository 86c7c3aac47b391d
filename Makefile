# make demo | make test | make build: each installs what it needs (Debian packages), configures a
# CMake preset and builds; all are safe to repeat.
PRESET ?= release
BUILD := build/$(PRESET)
JOBS ?= $(shell nproc)
FUZZ_SECONDS ?= 60

.PHONY: help demo build finetune test test-full sanitize fuzz bench lint format clean

help:
	@echo "make demo       build, start a server with the demo model, quantise and classify (KEEP=1: leave it running)"
	@echo "make test       build and run unit, kernel, integration and end-to-end tests"
	@echo "make test-full  the tests against others: torchvision, onnxruntime, Pillow; AVX-512 kernels on an emulated CPU"
	@echo "make build      only build: $(BUILD)/bin/ternd, $(BUILD)/bin/ternctl"
	@echo "make finetune   build $(BUILD)/bin/tern-finetune, which needs libtorch (TEST=1: also run its tests)"
	@echo "make sanitize   the tests under AddressSanitizer and UndefinedBehaviorSanitizer, then ThreadSanitizer (hours)"
	@echo "make fuzz       every libFuzzer target for FUZZ_SECONDS=$(FUZZ_SECONDS) (FUZZ_TARGETS=\"onnx image\": only these)"
	@echo "make bench      kernel and engine benchmarks"
	@echo "PRESET=release|dev|ci|asan-ubsan|tsan  JOBS=$(JOBS)"

build:
	@scripts/install-deps.sh build
	@cmake --preset $(PRESET) -DTERN_BUILD_TESTS=OFF
	@cmake --build $(BUILD) -j $(JOBS)
	@echo "built $(BUILD)/bin/ternd and $(BUILD)/bin/ternctl"

finetune:
	@scripts/install-deps.sh finetune
	@cmake --preset $(PRESET) -DTERN_FINETUNE=ON -DTERN_BUILD_TESTS=$(if $(TEST),ON,OFF)
	@cmake --build $(BUILD) -j $(JOBS)
	@$(if $(TEST),ctest --test-dir $(BUILD) --output-on-failure -L finetune,echo "built $(BUILD)/bin/tern-finetune")

demo: build
	@scripts/install-deps.sh demo
	@scripts/demo.sh $(BUILD) $(if $(KEEP),--keep)

test:
	@scripts/install-deps.sh test
	@cmake --preset $(PRESET) -DTERN_BUILD_TESTS=ON
	@cmake --build $(BUILD) -j $(JOBS)
	@ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS) -LE 'full|bench'
	@scripts/skipped.sh $(BUILD)

test-full:
	@scripts/install-deps.sh full
	@cmake --preset $(PRESET) -DTERN_BUILD_TESTS=ON
	@cmake --build $(BUILD) -j $(JOBS)
	@scripts/test-full.sh $(BUILD)
	@scripts/skipped.sh $(BUILD)

# Timing means nothing here.
sanitize:
	@scripts/install-deps.sh test
	@for preset in asan-ubsan tsan; do cmake --preset $$preset && cmake --build --preset $$preset -j $(JOBS) && \
	  ctest --preset $$preset -j $(JOBS) -LE 'full|bench|deploy|lint' || exit 1; scripts/skipped.sh build/$$preset; done

fuzz:
	@scripts/install-deps.sh fuzz
	@cmake --preset fuzz
	@cmake --build --preset fuzz -j $(JOBS)
	@scripts/fuzz.sh build/fuzz $(FUZZ_SECONDS) $(FUZZ_TARGETS)

bench:
	@scripts/install-deps.sh test
	@cmake --preset $(PRESET) -DTERN_BUILD_TESTS=ON
	@cmake --build $(BUILD) -j $(JOBS)
	@$(BUILD)/bin/kernels_bench

lint:
	@ctest --test-dir $(BUILD) --output-on-failure -L lint

format:
	@git ls-files '*.h' '*.cc' | xargs clang-format -i

clean:
	@rm -rf build
