# `make demo` and `make test` do all the set-up by themselves, into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format docs clean

demo: .venv/demo.stamp  ## adapt a small denoiser to rain, haze and low light, and show it
	$(BIN)/python examples/demo/run.py

test: .venv/dev.stamp lint  ## lint, types, tests with coverage
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile \
		--cov=perceive_adapter --cov-fail-under=90

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/docs.stamp  ## the API reference as HTML
	$(BIN)/pdoc --docformat google --output-directory out/docs perceive_adapter \
		$(addprefix perceive_adapter.,data data.pairs data.restoration data.samples losses ops hub \
		training.restoration training.treated)

clean:
	rm -rf .venv out dist .coverage .pytest_cache .mypy_cache .ruff_cache

.venv/bin/pip:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"  # knows dependency groups

.venv/demo.stamp: pyproject.toml | .venv/bin/pip
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	@touch $@

.venv/dev.stamp: pyproject.toml | .venv/bin/pip
	$(BIN)/python -m pip install --quiet -e ".[train,demo]" --group dev
	@touch $@ .venv/demo.stamp

.venv/docs.stamp: pyproject.toml .venv/dev.stamp
	$(BIN)/python -m pip install --quiet --group docs
	@touch $@
