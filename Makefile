# make demo    see it work, on a real Consul of its own
# make quick   lint, types, and the unit tests that need no socket, no process and no waiting
# make test    everything: lint, types, unit tests, and the integration tests on a real Consul
#
# Both set up all they need (Python >= 3.10 is assumed, nothing else), in .venv and .tox.
# A Consul program is found, or fetched, by consul_matchmaker/demo/consul_binary.py.
# make test uses Docker too when an engine answers; INTEGRATION="local docker" insists on both.
# It runs oslo.messaging beside Redis when there is a redis-server; OSLO=oslo insists on it.

PYTHON ?= python3
INTEGRATION ?= local $(if $(shell docker version --format '{{.Server.Version}}' 2>/dev/null),docker)

BIN := .venv/bin
comma := ,
empty :=
space := $(empty) $(empty)
OSLO ?= $(if $(shell command -v redis-server),oslo)
CHECKS = lint types unit py-consul $(addprefix integration-,$(INTEGRATION)) long $(OSLO)

.DEFAULT_GOAL := help
.PHONY: help demo quick test clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: .venv/ready
	$(BIN)/consul-matchmaker demo

quick: .venv/ready
	$(BIN)/tox run -e lint,types,quick

test: .venv/ready
	$(BIN)/tox run -e $(subst $(space),$(comma),$(strip $(CHECKS)))

# Made again only when what is to be installed changes.
.venv/ready: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . 'tox>=4.11'
	touch $@

clean:
	rm -rf .venv .tox build dist *.egg-info
