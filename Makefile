# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header
DATA ?= cifar10
# Of the image: cpu or cuda.
VARIANT ?= cpu
# Test files that run side by side.
JOBS ?= 2
# How the embedded checkpoint was made: two joint epochs, then half of one and four more, each from the result of the one before.
JOINT_2 = --data $(DATA) --run runs/compact-2 --init runs/compact/joint.checkpoint --set joint.epochs=0.5 \
	--set joint.peak_lr=0.008 --set joint_epsilons=[0.037] --set loss.clean=0.1
JOINT_3 = --data $(DATA) --run runs/compact-3 --init runs/compact-2/joint.checkpoint --set joint.epochs=4 \
	--set joint.peak_lr=0.02 --set loss.experts=0.2

# Of `make train-full`: where, and after how many minutes it ends to be given again.
DEVICE ?= cuda
MINUTES ?=
# Given, nothing is installed: TRAIN="python3 -m training.cli" on a machine without a package index.
TRAIN ?= $(BIN)/palisade-train
READY := $(if $(filter file,$(origin TRAIN)),setup)

# Where it is set, each of the many processes of the tests compiles torch anew: 20 s instead of 3.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-15s %s\n", $$1, $$2}'

.PHONY: setup
setup: $(VENV)/.ready ## prepare .venv and nothing else

$(VENV)/.ready: requirements/uv.txt requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements/dev.txt requirements/uv.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

.PHONY: serve
serve: setup ## serve the embedded checkpoint on 127.0.0.1:8000
	$(BIN)/palisade-serve run

.PHONY: test
test: setup ## run the tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: lint
lint: setup ## check format, style, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: coverage
coverage: setup ## run the tests and print what they cover
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

.PHONY: train-compact
train-compact: setup ## train the embedded checkpoint anew; DATA=file.npz instead of a download; hours on two cores, resumes
	$(BIN)/palisade-train pretrain --data $(DATA) --run runs/compact
	$(BIN)/palisade-train joint --data $(DATA) --run runs/compact
	$(BIN)/palisade-train export --data $(DATA) --run runs/compact --out runs/compact/joint.checkpoint
	$(BIN)/palisade-train joint $(JOINT_2)
	$(BIN)/palisade-train export $(JOINT_2) --out runs/compact-2/joint.checkpoint
	$(BIN)/palisade-train joint $(JOINT_3)
	$(BIN)/palisade-train export $(JOINT_3) --out model/checkpoints/compact.safetensors
	$(BIN)/palisade-train evaluate --data $(DATA) --checkpoint compact --stamp

.PHONY: train-full
train-full: $(READY) ## train the full-size mixture, its rivals and its pupil on a GPU; resumes; MINUTES=8 for slices
	began=$$(date +%s); train() { name=$$1; shift; [ ! -e runs/$$name.safetensors ] || return 0; \
		left=$$(($(or $(MINUTES),525600) * 60 + began - $$(date +%s))); [ $$left -gt 0 ] || exit 75; \
		$(TRAIN) slice --data $(DATA) --device $(DEVICE) $(if $(filter cuda%,$(DEVICE)),--compile) \
			--minutes $$(awk "BEGIN{print $$left / 60}") --run runs/$$name --parts runs/$$name/parts \
			--out runs/$$name.safetensors "$$@" || exit; }; \
	for recipe in full wide single; do train $$recipe --recipe $$recipe; done; \
	train untaught --recipe compact; train taught --recipe compact --teacher runs/full.safetensors

.PHONY: judge-full
judge-full: $(READY) ## attack all that train-full made; each report stands alone and resumes
	failed=0; judge() { name=$$1; shift; mkdir -p runs/$$name; $(TRAIN) evaluate --data $(DATA) --device $(DEVICE) --level full --n 1000 \
		--checkpoint runs/$$name.safetensors --out runs/$$name/report "$$@" || failed=$$?; }; \
	judge full --compare runs/wide.safetensors --compare runs/single.safetensors; \
	judge taught --compare runs/untaught.safetensors; \
	judge wide; judge single; judge untaught; exit $$failed

.PHONY: runtime-check
runtime-check: setup ## install only what the service needs, elsewhere, and classify an image with it
	rm -rf build/dist
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python build/runtime
	$(BIN)/uv pip sync --quiet --python build/runtime/bin/python --require-hashes requirements/service.txt
	$(BIN)/uv build --quiet --wheel --no-build-isolation --python $(BIN)/python --out-dir build/dist .
	$(BIN)/uv pip install --quiet --python build/runtime/bin/python --no-deps --reinstall build/dist/palisade-*.whl
	cd build && runtime/bin/python ../tests/runtime_check.py

.PHONY: image
image: ## build the service's image, palisade:latest; VARIANT=cuda for NVIDIA GPUs, palisade:latest-cuda
	DOCKER_BUILDKIT=1 docker build --file docker/service.Dockerfile --build-arg VARIANT=$(VARIANT) \
		--build-arg REVISION=$$(git rev-parse HEAD) --tag palisade:latest$(if $(filter cuda,$(VARIANT)),-cuda) .

.PHONY: image-check
image-check: setup ## as root: build the image with a Docker daemon of its own, and use it as an operator would
	docker/check.sh

.PHONY: up
up: docker/.env ## start the service with Redis, Prometheus and Grafana; their passwords go to docker/.env
	docker compose --file docker/compose.yaml up --build --detach --wait

.PHONY: down
down: docker/.env ## stop what `make up` started; its data stays
	docker compose --file docker/compose.yaml down

docker/.env:
	umask 077 && for name in REDIS_PASSWORD LIMITER_SECRET GRAFANA_PASSWORD; do \
		echo "$$name=$$($(PYTHON) -c 'import secrets; print(secrets.token_hex(32))')"; done > $@

.PHONY: clients
clients: setup ## install kserve's client, whose pins fit nothing else, into an environment of its own; its test skips without
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python build/clients
	$(BIN)/uv pip sync --quiet --python build/clients/bin/python --require-hashes requirements/clients.txt

.PHONY: manifests-check
manifests-check: setup ## look for weak spots in the Kubernetes manifests, with checkov in an environment of its own
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python build/checkov
	$(BIN)/uv pip sync --quiet --python build/checkov/bin/python --require-hashes requirements/checkov.txt
	$(BIN)/python -m tests.deploy.manifests build/manifests
	build/checkov/bin/checkov --config-file k8s/.checkov.yaml --directory build/manifests

.PHONY: requirements
requirements: ## write the pinned requirement files anew
	$(COMPILE) pyproject.toml --extra cpu --extra redis --extra tracing --output-file requirements/service.txt
	$(COMPILE) pyproject.toml --extra dev --output-file requirements/dev.txt
	printf '%s\n' torch torchvision openvino-telemetry | $(COMPILE) pyproject.toml --extra cpu --extra redis --extra tracing \
		--excludes - --constraint requirements/service.txt --output-file requirements/service-cpu.txt
	printf '%s\n' triton setuptools | $(COMPILE) pyproject.toml --extra gpu --extra redis --extra tracing \
		--excludes - --constraint requirements/service.txt --output-file requirements/service-cuda.txt
	$(COMPILE) pyproject.toml --extra train --extra screen --constraint requirements/dev.txt --output-file requirements/training.txt
	echo hatchling | $(COMPILE) - --constraint requirements/dev.txt --output-file requirements/build.txt
	echo kserve | $(COMPILE) - --output-file requirements/clients.txt
	echo checkov | $(COMPILE) - --output-file requirements/checkov.txt
	echo uv | $(COMPILE) - --output-file requirements/uv.txt

.PHONY: clean
clean: ## remove what the other targets made
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
