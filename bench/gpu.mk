# All that needs a GPU, in less than 25 minutes: `make gpu`. Not yet run on a GPU.
#
# A stage that passed leaves a mark in a folder of .gpu/<device>/ that is named after all else the stage depends on:
# torch, Triton, code, and launch tables (but for the tuning, which writes one). While the mark is there it is not run
# again; a run removes the device's other marks of its stage, as the record holds the figures of the last run alone.
# `make gpu-dry-run` needs no GPU: the stages as far as they go, tiny, in Triton's interpreter.
PYTHON ?= python3
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(PYTHONPATH)
MAKEFLAGS += --keep-going --no-print-directory
.NOTPARALLEL:

# A stage: its minutes at most, and what is run.
correctness := 9m $(PYTHON) -m pytest -q -p no:cacheprovider -m gpu tests/kernels/test_triton_gpu.py
kernels := 5m $(PYTHON) -m bench.run --device cuda --suite 'kernels on a GPU'
end-to-end := 3m $(PYTHON) -m bench.run --device cuda --suite 'PyHealth end to end'
chains := 2m $(PYTHON) -m bench.run --device cuda --suite 'rows from maps' --suite 'rows from Q,K' --suite 'full matrix'
tuning := 5m $(PYTHON) -m rollout_kernels._triton.tune --minutes 4
pages := 1m $(PYTHON) -m bench.pages

DEVICE := $(shell $(PYTHON) -c 'import re, torch; torch.cuda.is_available() and \
	print(re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()))')
$(if $(DEVICE)$(filter gpu-dry-run,$(MAKECMDGOALS)),,\
	$(error no CUDA device is available; nothing was run (make gpu-dry-run needs none)))
digest = $(shell ($(PYTHON) -c 'import torch, triton; print(torch.__version__, triton.__version__)'; \
	find kernels rollout bench tests/kernels tests/support \( -name '*.py' -o -name gpu.mk $(1) \) \
	-exec sha256sum {} + | LC_ALL=C sort) | sha256sum | cut -c -16)
WITH_TABLES := .gpu/$(DEVICE)/$(call digest,-o -path '*/tuned/*.json')
WITHOUT_TABLES := .gpu/$(DEVICE)/$(call digest)
AFTER := $(addprefix $(WITH_TABLES)/,kernels end-to-end chains) $(WITHOUT_TABLES)/tuning

gpu: $(WITH_TABLES)/correctness $(AFTER) pages
	@echo "gpu: every stage passed"

$(AFTER): | $(WITH_TABLES)/correctness  # no time is taken of kernels that are wrong

# What takes too long, or is interrupted, is ended with all that it started: timeout is the head of a process group.
within = timeout -s KILL $($(@F)) & trap "kill $$!" INT TERM HUP; wait $$!

.gpu/%:
	@mkdir -p $(@D) && rm -f .gpu/$(DEVICE)/*/$(@F)
	$(within) && touch $@

pages:
	$(within)

# The suites are run by `bench.run --quick` on any machine, and the pages by their tests.
TINY := TRITON_INTERPRET=1 BENCH_DEVICE=cpu CUDA_VISIBLE_DEVICES= timeout
gpu-dry-run:
	$(TINY) $(correctness)
	$(TINY) 5m $(PYTHON) -m pytest -q -p no:cacheprovider bench/test_gpu.py --quick --benchmark-disable -k 'not compile'
	$(TINY) 5m $(PYTHON) -m rollout_kernels._triton.tune --dry-run

.PHONY: gpu gpu-dry-run pages
