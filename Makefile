# Python must not put the working folder first on sys.path: our room `kernels` is no package of its own.
export PYTHONSAFEPATH := 1
BIN := .venv/bin

.PHONY: demo test check bench soak
demo: .venv/.ready
	$(BIN)/backmix demo --out demo

test: .venv/.ready
	$(BIN)/pytest -n 2 --dist loadfile

check: .venv/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

bench: .venv/.ready
	$(BIN)/python bench/cpu.py

soak: .venv/.ready
	BACKMIX_SOAK_KILLS=$${BACKMIX_SOAK_KILLS:-1000} HYPOTHESIS_PROFILE=soak $(BIN)/pytest -n 2 --dist loadfile --timeout 7200

.venv/.ready: pyproject.toml .ci/setup
	sh .ci/setup
