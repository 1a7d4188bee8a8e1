# The commands of a checkout; each may be run again at any time. What they do is in
# packaging/checkout/, what they make is in .run/ and .venv/.

SHELL := /bin/bash
.DEFAULT_GOAL := help
CHECKOUT := packaging/checkout
# -B: root runs these in what may be somebody else's checkout; leave no caches of root's in it.
PYTHON := /usr/bin/env -u PYTHONPATH python3 -B

NETNS ?=
IMAGE ?=
VM ?= my_vm
ARGS ?=

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*## /|/' | column -t -s '|'

.PHONY: install
install: ## Install what is missing: Debian packages, two system users, .venv
	@$(CHECKOUT)/install

.PHONY: up
up: install ## Start it all and make the vm my_vm  [NETNS=name IMAGE=debian_12/tiny VM=my_vm]
	@$(PYTHON) $(CHECKOUT)/up.py --netns '$(NETNS)' --image '$(IMAGE)' --vm '$(VM)'

.PHONY: down
down: ## Stop the vms, the shim and the daemon; disks stay
	@$(PYTHON) $(CHECKOUT)/down.py

.PHONY: clean
clean: ## down, then remove what was made: .run, .venv, caches
	@$(PYTHON) $(CHECKOUT)/down.py --clean

.PHONY: ctl
ctl: ## Run the command line on this checkout's daemon  [ARGS="vm-list"]
	@OSCLOUD_SOCKET='$(CURDIR)/.run/oscloudd.sock' .venv/bin/oscloudctl $(ARGS)

.PHONY: test
test: ## Install what the tests need and run them all  [ARGS="-k name"]
	@$(CHECKOUT)/install --test
	.venv/bin/pytest --numprocesses 2 --dist loadfile $(ARGS)

.PHONY: lint
lint: ## Check style, format and types
	@$(CHECKOUT)/install --test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/mypy $(wildcard $(CHECKOUT)/*.py)

.PHONY: deb
deb: ## Build dist/oscloud_<version>_amd64.deb
	@$(CHECKOUT)/install --deb
	@packaging/build-deb

.PHONY: bench
bench: ## Measure against a bare qemu, side by side
	@$(CHECKOUT)/install --test
	.venv/bin/python tests/bench $(ARGS)

.PHONY: kills
kills: ## Kill the daemon 1,000 times with a fake qemu, 30 with real guests  [ARGS="--seed 7"]
	@$(CHECKOUT)/install --test
	OSCLOUD_KILL_STRIDE=1 .venv/bin/pytest -q tests/test_kill_matrix.py
	.venv/bin/python tests/kill_arena.py $(ARGS)

.PHONY: soak
soak: ## Make and remove vms for half an hour; look what leaks  [ARGS="--minutes 5"]
	@$(CHECKOUT)/install --test
	.venv/bin/python tests/soak $(ARGS)
