# Every way to use the repository; `make help` lists them. One build profile (release) serves all of them.

export PATH := $(HOME)/.cargo/bin:$(PATH)
CARGO ?= cargo
OUT ?= demo_out
CMD ?= target/release/ringtune doctor
# MPI=no builds without MPI where there is one.
MPI ?=
export MPI

.DEFAULT_GOAL := help
.PHONY: help bootstrap tools build test test-product test-full test-vgpu lint bench dist check-targets demo install vgpu clean-demo

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

bootstrap: tools ## install what the build and the tests need, only where it is missing
	@scripts/bootstrap.sh tests
	@scripts/nvrtc.sh

tools:
	@scripts/bootstrap.sh

build: tools ## build the programs: target/release/ringtune and ringrun; with MPI where it is found (MPI=no: without)
	$(CARGO) build --release $$(scripts/features.sh)

test: bootstrap ## format, lints, every test, documentation: what CI runs
	@scripts/test.sh

test-product: bootstrap ## the same for the program alone, with its CUDA tests on the emulated GPU
	@scripts/test.sh product

test-full: bootstrap ## the same with every sweep run whole: an hour and more on two cores
	@RINGTUNE_FULL=1 scripts/test.sh

test-vgpu: bootstrap ## the same for the emulator of tests/vgpu alone, which changes seldom
	@scripts/test.sh vgpu

lint: tools ## format and lints alone
	@scripts/test.sh lint

bench: tools ## time the kernels and whole training steps on this machine; results are checked first (FLAGS="--json")
	$(CARGO) bench $$(scripts/features.sh) --bench kernels --bench step $(if $(FLAGS),-- $(FLAGS))

dist: tools ## pack programs, completions, man pages, licences and kernels for other machines: dist/*.tar.gz
	@scripts/dist.sh

check-targets: tools ## type-check the launcher for aarch64 Linux and macOS, with stand-ins for their C compilers
	@scripts/check-targets.sh

demo: build ## the whole job on real text: pretrain, fine-tune, evaluate, generate, merge (OUT=folder)
	@scripts/demo.sh "$(OUT)"

vgpu: build ## run a command on the emulated GPU of tests/vgpu (CMD="target/release/ringtune doctor")
	@scripts/vgpu.sh $(CMD)

clean-demo: ## forget what the demo wrote, so that it starts from nothing
	rm -rf "$(OUT)"

install: tools ## install ringtune and ringrun into ~/.cargo/bin
	$(CARGO) install --path . --locked $$(scripts/features.sh | sed s,ringtune/,,)
	$(CARGO) install --path launcher --locked
