# Each target sets up .venv first if need be; TORCH="torch==2.7.1" picks another torch, ARGS is passed on.
.PHONY: demo wmt14-smoke test quick test-all test-floor check docs kernel-report gpu
.NOTPARALLEL:

QUICK = -m "not slow and not long" tests/attention tests/nmt tests/package

demo:      # train a small translator on the CPU or GPU found and score it
	scripts/demo.sh $(ARGS)

wmt14-smoke: # every step of examples/wmt14 on self-made text, in a minute
	scripts/wmt14_smoke.sh $(ARGS)

test:      # every tier that runs here, in minutes
	scripts/test.sh -m "not slow" $(ARGS)

quick:     # attention, translation and the package, in a minute
	scripts/test.sh $(QUICK) $(ARGS)

test-all:  # the full products of cases
	scripts/test.sh --full $(ARGS)

test-floor: # the tests of quick on Python 3.10 and torch 2.7.1, in a .venv-floor of their own
	scripts/test_floor.sh $(QUICK) $(ARGS)

check:     # style and types
	scripts/check.sh

docs:      # the site of docs/, into site/
	scripts/docs.sh $(ARGS)

kernel-report: # what the kernels are predicted to do on a P100, a V100, a T4 and an A100, into docs/; about ten minutes
	scripts/kernel_report.sh $(ARGS)

gpu:       # on a CUDA device: its tests, tuning and benchmarks into benchmarks/results/; ARGS=--full for every case
	scripts/gpu.sh $(ARGS)
