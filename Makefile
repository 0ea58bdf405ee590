# One word for each duty. Every recipe is one line that works without make, too, once .venv is there (see README.md).

.PHONY: image test check bench gpu-test gpu-bench gpu-latency

image: .venv/.installed
	.venv/bin/python examples/first_image.py

test: .venv/.installed
	.venv/bin/python -m pytest -n 2

check: .venv/.installed
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy
	.venv/bin/python -m pytest tests/test_imports.py

bench: .venv/.installed
	.venv/bin/python benchmarks/latency.py

gpu-test: .venv/.installed
	.venv/bin/python -m pytest -m gpu

gpu-bench:
	@echo "gpu-bench: not built yet: there are no kernels to measure" >&2; exit 1

gpu-latency:
	@echo "gpu-latency: not built yet: benchmarks/latency.py runs on the CPU alone" >&2; exit 1

.venv/.installed: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e '.[test,dev]'
	touch .venv/.installed
