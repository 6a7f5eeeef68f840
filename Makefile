# `make demo` and `make test` need Python 3.11 or newer and make. The first run installs into .venv, later ones re-use it.
PYTHON ?= python3
export OMP_WAIT_POLICY := PASSIVE

.PHONY: install demo app test test-slow test-quant lint bench

install: .venv/.installed

.venv/.installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	@echo 'Installing into .venv: a minute or two, the first time.'
	.venv/bin/python -m pip --disable-pip-version-check install --quiet --root-user-action ignore --constraint constraints.txt --editable '.[train,eval,demo,dev]'
	@touch $@

demo: install
	.venv/bin/python demo.py --output outputs/demo

app: install
	.venv/bin/python app.py --open

test: install
	.venv/bin/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m 'not slow'

test-slow: install
	.venv/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile -m slow

# The extra `quant` stays out of .venv: its packages are large, and every command that imports peft would load them, with
# messages on standard error.
test-quant: .venv/quant/.installed
	PYTHONPATH=.venv/quant .venv/bin/python -m pytest -k 'quanti or using' tests/test_quantization.py tests/test_docs_using.py tests/test_train.py

.venv/quant/.installed: .venv/.installed
	.venv/bin/python -m pip --disable-pip-version-check install --quiet --root-user-action ignore --constraint constraints.txt --no-deps --upgrade --target .venv/quant bitsandbytes torchao
	@touch $@

bench: install
	.venv/bin/python benchmarks/speed.py
	.venv/bin/python benchmarks/training_step.py
	.venv/bin/python benchmarks/growth.py

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
