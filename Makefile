# Every target runs the same code as the notebooks and as granite-pipeline.
PYTHON ?= python3
VENV ?= .venv
DEVICE ?= auto
NAME ?= generic
OUTPUT ?= training/output
BIN := $(VENV)/bin
# a changed requirement changes the stamp's name, so that set-up runs again by itself
STAMP := $(VENV)/.ready-$(shell cat pyproject.toml constraints/*.txt training/scripts/setup_environment.py training/scripts/checks.json | cksum | cut -d' ' -f1)
PIPELINE := $(BIN)/granite-pipeline
RUN = --name '$(NAME)' --output '$(OUTPUT)'
opt = $(if $($(1)),$(2) '$($(1))')
TRAIN_OPTIONS = $(call opt,BASE,--base) $(call opt,DATA,--data) $(call opt,EVAL_DATA,--eval-data) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup doctor run sweep test test-all check lab train export modelfile parity verify certify report runs prune long status ps logs stop bench clean \
        config gateway status-api compose kubernetes \
        train-serve-ollama train-serve-vllm train-serve-llamacpp

help: ## list the targets
	@echo "make TARGET [NAME=run] [BASE=embedded|hub id|folder] [DATA=soc|file] [EVAL_DATA=file] [BACKENDS=vllm,llamacpp] [ARGS='...']"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-20s %s\n", $$1, $$2}'

# the environment's own Python where there is one that starts, unless another was asked for
SET_UP_WITH = $(if $(filter file,$(origin PYTHON)),$(shell '$(BIN)/python' -c '' 2>/dev/null && echo '$(BIN)/python' || echo $(PYTHON)),$(PYTHON))

define INSTALL
@command -v $(SET_UP_WITH) >/dev/null || { echo "there is no $(SET_UP_WITH): install Python 3.11, 3.12 or 3.13, or name one (make setup PYTHON=python3.12)"; exit 3; }
$(SET_UP_WITH) training/scripts/setup_environment.py --venv '$(VENV)' --device $(DEVICE)
@rm -f $(VENV)/.ready-*
@touch $(STAMP)
endef

# always, also where everything is there: it is what people are told to do about a package that is broken or for another device
setup: ## install everything this machine needs into .venv and check that it imports (DEVICE=cpu|cuda)
	$(INSTALL)

$(STAMP):
	$(INSTALL)

doctor: $(STAMP) ## check machine, packages, ports and the run's files, then the imports; say how to mend what is wrong
	@$(PIPELINE) doctor $(RUN); code=$$?; $(BIN)/python training/scripts/setup_environment.py --check && exit $$code

run: $(STAMP) ## fine-tune, export, serve and verify; open the report it names at the end
	$(PIPELINE) run $(RUN) $(TRAIN_OPTIONS) $(call opt,BACKENDS,--backends)

SPEC ?= sweep.yaml
sweep: $(STAMP) ## the runs of a spec, and one page that compares them (SPEC=sweep.yaml ARGS='--jobs 2')
	$(PIPELINE) sweep '$(SPEC)' --output '$(OUTPUT)' $(ARGS)

# a worker a core, each with whole files (tests/conftest.py); ARGS='-n 0' runs one test at a time
PYTEST = $(BIN)/python -m pytest -n auto

test: $(STAMP) ## the tests of each part, with one small end-to-end run on the real vLLM and llama.cpp
	$(PYTEST) -m "not wide" $(ARGS)

test-all: $(STAMP) ## every test but the long ones (ARGS='-m wide': only what 'make test' leaves out)
	$(PYTEST) $(ARGS)

check: $(STAMP) ## format, lint, types and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -q -m "not slow and not e2e"

lab: $(STAMP) ## open the notebooks in JupyterLab
	JUPYTER_PATH="$$(cd '$(VENV)' && pwd)/share/jupyter$${JUPYTER_PATH:+:$$JUPYTER_PATH}" $(BIN)/jupyter lab notebooks

train: $(STAMP) ## fine-tune only: adapter/
	$(PIPELINE) train $(RUN) $(TRAIN_OPTIONS)

export: $(STAMP) ## merge, GGUF, Modelfile and reference answers from the adapter
	$(PIPELINE) export $(RUN)

modelfile: $(STAMP) ## write the run's Modelfile and say which renderer Ollama will use
	$(PIPELINE) modelfile --run '$(NAME)' --output '$(OUTPUT)' --explain

train-serve-ollama: train export ## fine-tune, export, then serve with Ollama until Ctrl-C
	$(PIPELINE) serve ollama $(RUN)

train-serve-vllm: train export ## fine-tune, export, then serve with vLLM until Ctrl-C
	$(PIPELINE) serve vllm $(RUN)

train-serve-llamacpp: train export ## fine-tune, export, then serve with llama.cpp until Ctrl-C
	$(PIPELINE) serve llamacpp $(RUN)

parity: $(STAMP) ## compare the prompts of the run's files and engines with the tokenizer's, 141 conversations
	$(PIPELINE) parity --run '$(NAME)' --output '$(OUTPUT)' --start

verify: $(STAMP) ## question every backend of a run and write its report
	$(PIPELINE) verify $(RUN) $(call opt,BACKENDS,--backends) $(ARGS)

certify: $(STAMP) ## prove each link from training to the served answer (ARGS='--offline' without a server)
	$(PIPELINE) certify $(RUN) $(call opt,BACKENDS,--backends) $(ARGS)

report: $(STAMP) ## draw the report again from report.json
	$(PIPELINE) report --run '$(NAME)' --output '$(OUTPUT)'

runs: $(STAMP) ## list the runs: how far each got, how big, who works on it
	$(PIPELINE) runs --output '$(OUTPUT)'

prune: $(STAMP) ## show what no run needs any more, and remove it after a yes
	$(PIPELINE) prune --output '$(OUTPUT)' $(ARGS)

long: $(STAMP) ## the tests that take many minutes: at least 60 kills over all stages
	$(BIN)/python -m pytest -m long -s

status: $(STAMP) ## which servers of the run are up
	$(PIPELINE) status $(RUN)

ps: $(STAMP) ## every server of every run: process, port, state, age, memory
	@$(PIPELINE) ps --output '$(OUTPUT)'

logs: $(STAMP) ## the log of the run's last server start
	@$(PIPELINE) logs $(RUN)

stop: $(STAMP) ## stop the servers of the run (ARGS=--all: of every run)
	$(PIPELINE) stop $(RUN) $(ARGS)

bench: $(STAMP) ## planned flags against defaults and guides on this machine (ARGS='--engine vllm --quick --sweep')
	$(BIN)/python -m benchmarks.serve --run '$(NAME)' --output '$(OUTPUT)' $(ARGS)

config: $(STAMP) ## every setting, where it comes from, and what contradicts
	$(PIPELINE) config

gateway: $(STAMP) ## one address for all backends, with fallback, on port 4000 until Ctrl-C
	$(PIPELINE) gateway --output '$(OUTPUT)'

status-api: $(STAMP) ## health of the backends on port 8080 (page, JSON, /metrics) until Ctrl-C
	$(PIPELINE) status-api --output '$(OUTPUT)'

compose: $(STAMP) ## make docker-compose.yml and docker-compose.gpu.yml again from the plans
	$(PIPELINE) compose > docker-compose.yml.new && mv docker-compose.yml.new docker-compose.yml
	$(PIPELINE) compose --gpu > docker-compose.gpu.yml.new && mv docker-compose.gpu.yml.new docker-compose.gpu.yml

kubernetes: $(STAMP) ## print the manifests that serve the run on a cluster (ARGS='--engine vllm --hardware l4 --replicas 2')
	@$(PIPELINE) kubernetes $(RUN) $(ARGS)

clean: ## remove the environment and caches; runs in training/output are kept
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
