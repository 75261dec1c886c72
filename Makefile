# make demo    see it work, on a real Consul of its own
# make quick   lint, types, and the unit tests that need no socket, no process and no waiting
# make test    all that can run here: also the other unit tests, and those on a real Consul
#
# All set up what they need (Python >= 3.10 is assumed, nothing else), in .venv and .tox.
# A Consul program is found, or fetched, by consul_matchmaker/testing/consul_binary.py.
# make test says at its end what was left out, and what that needs.

PYTHON ?= python3

BIN := .venv/bin
comma := ,
empty :=
space := $(empty) $(empty)
HAS_DOCKER := $(shell docker version --format '{{.Server.Version}}' 2>/dev/null)
HAS_REDIS := $(shell command -v redis-server)
CHECKS ?= lint types unit py-consul integration-local \
	$(if $(HAS_DOCKER),integration-docker) $(if $(HAS_REDIS),oslo)
# With what is missing here, said at the end.
define LEFT_OUT
$(if $(findstring integration-docker,$(CHECKS)),,integration-docker: needs a Docker engine that answers
)$(if $(findstring oslo,$(CHECKS)),,oslo: needs redis-server
)$(if $(findstring long,$(CHECKS)),,long, rpc, callers, recipes and soak: need minutes (.venv/bin/tox run -e long,rpc,callers,recipes,soak)
)
endef
export LEFT_OUT

# tox finds interpreters on PATH, and pyenv's by this.
PYENV_ROOT ?= $(HOME)/.pyenv
export TOX_DISCOVER ?= $(subst $(space),$(comma),$(wildcard $(PYENV_ROOT)/versions/3.1*/bin/python))

.DEFAULT_GOAL := help
.PHONY: help demo quick test clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: .venv/ready
	$(BIN)/consul-matchmaker demo

quick: .venv/ready
	$(BIN)/tox run -e lint,types,quick

test: .venv/ready
	@mkdir -p .tox
	@echo "$$LEFT_OUT" >.tox/left-out
	@$(BIN)/tox run -e $(subst $(space),$(comma),$(strip $(CHECKS))); status=$$?; \
	sort -u .tox/left-out | sed '/^$$/d' | paste -s -d ';' - | sed 's/;/; /g; s/^./left out here: &/'; \
	exit $$status

# Made again only when what is to be installed changes.
.venv/ready: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . 'tox>=4.11'
	touch $@

clean:
	rm -rf .venv .tox build dist *.egg-info
