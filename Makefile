# One word for each duty. Every recipe is one line that works without make, too, once .venv is there (see README.md).

OUT ?= benchmarks/results/h200
GPU_PYTHON ?= python3
GPU_TARGET ?= 90
WHEELS ?= wheels

.PHONY: image test check bench gpu-test gpu-bench gpu-latency ready compile-all

image: .venv/.installed
	.venv/bin/fastldm "a large green triangle above a small yellow circle" --seed 2 -o first.png

test: .venv/.installed
	.venv/bin/python -m pytest -n 2

check: .venv/.installed
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy
	.venv/bin/python -m pytest tests/test_imports.py

bench: .venv/.installed
	.venv/bin/python benchmarks/latency.py

gpu-test: ready
	FASTLDM_TESTS=gpu $(GPU_PYTHON) -m pytest -m gpu tests/kernels/test_gpu.py tests/runtime/test_gpu.py

gpu-bench: ready
	$(GPU_PYTHON) benchmarks/kernels.py --seconds 480 --out $(OUT)/kernels.jsonl

# The machine with the GPU has torch, triton and the like of its own, and need not be on a network. Editable, as the
# folder fastldm/ here, which Python finds first, is without fastldm.kernels. What it lacks of the peers may lie in
# WHEELS: pip download --no-deps diffusers importlib_metadata zipp -d wheels
ready:
	if [ -d "$(WHEELS)" ]; then $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps "$(WHEELS)"/*.whl; fi
	$(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(GPU_PYTHON) -m tests.kernels.offline $(GPU_TARGET) --jobs $$(nproc) >/dev/null  # into Triton's cache, side by side

compile-all: .venv/.installed
	.venv/bin/python -m tests.kernels.offline 80 86 89 90 100 --jobs 2
	.venv/bin/python -m tests.kernels.offline 90 --dtype float32 --jobs 2
	.venv/bin/python -m tests.kernels.offline 90 --first --dtype bfloat16 --jobs 2
	.venv/bin/python -m tests.kernels.offline 90 100 --tma --op geglu --op linear --op conv2d --jobs 2

gpu-latency: ready
	$(GPU_PYTHON) benchmarks/latency.py --standard --seconds 400 --json $(OUT)/latency.json

.venv/.installed: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e '.[test,dev]'
	touch .venv/.installed
