# Two commands on a fresh machine: make train, make test. Each target that needs .venv makes it first (scripts/install.py).
# Works with GNU make 3.81, which macOS has: values are read with $(value), so that a $ in a path stays one.

PYTHON = python3
SHELL = /bin/sh
MAKEFLAGS += --no-print-directory

# make exports the variables of its command line; torch and llamahome read the same names and must not take them for their own.
clean_env := env -u WORLD_SIZE -u RANK -u LOCAL_RANK -u NODE_RANK -u MASTER_ADDR -u MASTER_PORT
install := $(PYTHON) scripts/install.py
llamahome := $(clean_env) .venv/bin/llamahome
python := $(clean_env) .venv/bin/python

usage.help             := make help
usage.setup            := make setup [PYTHON=python3.12]
usage.train            := make train [DATA_PATH=data/training/mine.jsonl] [MODEL=] [OUTPUT=] [EPOCHS=] [ARGS="--set training.seed=1"]
usage.train-resume     := make train-resume CHECKPOINT=output/training/checkpoint-1000 [OUTPUT=] [ARGS=]
usage.train-eval       := make train-eval MODEL=output/training/final DATA=data/eval/test.jsonl [ARGS=]
usage.train-distributed := make train-distributed EPOCHS=10 WORLD_SIZE=4 [DATA_PATH=] [MODEL=] [OUTPUT=] [ARGS=]
usage.train-multi-node := make train-multi-node EPOCHS=10 NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=192.168.1.100 \
                          [MASTER_PORT=] [WORLD_SIZE=] [DATA_PATH=] [MODEL=] [OUTPUT=] [ARGS=]
usage.test             := make test [ARGS="-k packing"|ARGS=--medium]
usage.test-slow        := make test-slow [ARGS=]
usage.check            := make check
usage.bench            := make bench [ARGS="--quick"]
usage.bench-gpu        := make bench-gpu [ARGS="--device cpu --toy"]
usage.docs             := make docs
usage.clean            := make clean

# 'it'\''s' is how a shell reads it's. $(call option,--model,MODEL) is empty when MODEL is.
quote = '$(subst ','\'',$(value $(1)))'
option = $(if $(value $(2)),$(1) $(call quote,$(2)))
# The same for names that launchers export as well: what is left over in the environment was not typed.
typed = $(if $(filter command,$(firstword $(origin $(2)))),$(call option,$(1),$(2)))

# $(call takes,NEEDED,ALLOWED): stops with the usage of this target when a variable is missing, or given and not known to it.
given := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
missing = $(strip $(foreach name,$(1),$(if $(value $(name)),,$(name))))
unknown = $(strip $(filter-out $(1) $(2) PYTHON SHELL MAKEFLAGS,$(given)))
refuse = { printf '%s\n' 'make $@: $(1)' 'usage: $(usage.$@)' >&2; exit 2; }
takes = $(if $(call missing,$(1)),$(call refuse,missing: $(call missing,$(1))),$(if $(call unknown,$(1),$(2)),$(call refuse,this target has no \
  $(call unknown,$(1),$(2))),:))

data = $(if $(value DATA_PATH),$(call quote,DATA_PATH),data/training/raw)
find_data = find -L data/training/raw -type f \( -name '*.json*' -o -name '*.ndjson' -o -name '*.parquet' -o -name '*.arrow' -o -name '*.csv' \
  -o -name '*.tsv' -o -name '*.txt' -o -name '*.gz' -o -name '*.zst' \)
sample = $(if $(value DATA_PATH),:,[ -n "$$($(find_data) 2>/dev/null)" ] || $(llamahome) data sample data/training/raw --rows auto)
common = $(call option,--model,MODEL) $(call option,--output,OUTPUT) $(call option,--epochs,EPOCHS) $(value ARGS)

.PHONY: help setup train train-resume train-eval train-distributed train-multi-node test test-slow check bench bench-gpu docs clean

help:
	@printf '%s\n' \
	'make train             trains the starter model on sample data for a few minutes, or on yours' '    $(usage.train)' \
	'make train-resume      goes on from a checkpoint, a run or latest' '    $(usage.train-resume)' \
	'make train-eval        measures a model or a run on a data file' '    $(usage.train-eval)' \
	'make train-distributed trains with several processes on this machine' '    $(usage.train-distributed)' \
	'make train-multi-node  trains on several machines; call it on each' '    $(strip $(usage.train-multi-node))' \
	'make setup             installs everything into .venv; the others do it when need be' '    $(usage.setup)' \
	'make test              runs the fast tests, or those that ARGS names, or with --medium all but the slow ones' '    $(usage.test)' \
	'make test-slow         runs the slow tests' '    $(usage.test-slow)' \
	'make check             checks format, style, types and architecture' \
	'make bench             measures speed and memory beside other trainers: an hour' '    $(usage.bench)' \
	'make bench-gpu         measures one GPU: correctness, speed, memory; ten minutes' '    $(usage.bench-gpu)' \
	'make docs              builds the documentation as a site in build/site' \
	'make clean             removes caches; data/, output/ and .venv stay'

setup:
	@$(call takes,,)
	@$(install)

train:
	@$(call takes,,DATA_PATH MODEL OUTPUT EPOCHS ARGS)
	@$(install) --if-needed
	@$(sample)
	@$(llamahome) train $(data) $(common)

train-resume:
	@$(call takes,CHECKPOINT,OUTPUT ARGS)
	@$(install) --if-needed
	@$(llamahome) train-resume $(call quote,CHECKPOINT) $(call option,--output,OUTPUT) $(value ARGS)

train-eval:
	@$(call takes,MODEL DATA,ARGS)
	@$(install) --if-needed
	@$(llamahome) train-eval $(call quote,MODEL) $(call quote,DATA) $(value ARGS)

train-distributed:
	@$(call takes,EPOCHS WORLD_SIZE,DATA_PATH MODEL OUTPUT ARGS)
	@$(install) --if-needed
	@$(sample)
	@$(llamahome) train-distributed $(data) $(call typed,--world-size,WORLD_SIZE) $(common)

train-multi-node:
	@$(call takes,EPOCHS NUM_NODES NODE_RANK MASTER_ADDR,MASTER_PORT WORLD_SIZE DATA_PATH MODEL OUTPUT ARGS)
	@$(install) --if-needed
	@$(sample)
	@$(llamahome) train-distributed $(data) $(call option,--num-nodes,NUM_NODES) $(call option,--node-rank,NODE_RANK) \
	  $(call option,--master-addr,MASTER_ADDR) $(call typed,--master-port,MASTER_PORT) $(call typed,--world-size,WORLD_SIZE) $(common)

test:
	@$(call takes,,ARGS)
	@$(install) --if-needed
	@$(python) -m pytest -m 'not slow' -n logical --maxprocesses 8 $(value ARGS)

test-slow:
	@$(call takes,,ARGS)
	@$(install) --if-needed
	@$(python) -m pytest -m slow $(value ARGS)

check:
	@$(call takes,,)
	@$(install) --if-needed
	@$(python) -m ruff format --check .
	@$(python) -m ruff check .
	@$(python) -m mypy
	@$(python) scripts/audit.py
	@$(python) -m pytest tests/test_architecture.py tests/test_documents.py

bench:
	@$(call takes,,ARGS)
	@$(install) --if-needed
	@$(python) -m benchmarks $(value ARGS)

bench-gpu:
	@$(call takes,,ARGS)
	@$(install) --if-needed
	@$(python) -m benchmarks.gpu $(value ARGS)

docs:
	@$(call takes,,)
	@$(PYTHON) scripts/docs_site.py

clean:
	@$(call takes,,)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	@find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
