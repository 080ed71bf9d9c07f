# Everything sets itself up. The virtual environment in .venv is brought up to date when pyproject.toml changes;
# `make clean` and the next target make it from nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Twice the processors: many tests wait for processes more than they work.
JOBS ?= $(shell expr 2 '*' `nproc`)
LAB_JOBS ?= $(shell nproc)
READY := $(VENV)/ready$(subst /,-,-$(PYTHON))
BENCH := benchmarks/build/fdmove
CFLAGS ?= -O2 -g
WARNINGS := -std=c11 -Wall -Wextra -Wpedantic -Wshadow -Werror
CHECKS := check-ruff check-format check-mypy check-pyright check-imports

FUZZ_S ?= 60
TARGETS ?= codec connection packet a_manifest a_box a_ledger daemon notification

PREFIX ?= /usr
ETC := $(DESTDIR)/etc

.PHONY: test test-lab lab-kernel lab-systemd faults demo bench fuzz golden soak lint clean install-systemd $(CHECKS)
.DELETE_ON_ERROR:

test: $(READY)-test  ## all tests
	@$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-lab: $(READY)-test  ## the tests that boot a kernel of their own, with live update, under QEMU
	@$(BIN)/python tests/lab/vm.py --check
	@$(BIN)/python -m pytest -m lab -rs -n $(LAB_JOBS) --dist loadfile tests/lab $(ARGS)

lab-kernel:  ## that kernel, from Debian's source, in the user's cache; where there is one already it is taken
	@'$(PYTHON)' tests/lab/vm.py --kernel || tests/lab/build-kernel "$$('$(PYTHON)' tests/lab/vm.py --kernel-place)"

lab-systemd:  ## a current systemd for some of them, from Debian sid, in the user's cache; where there is one already it is taken
	@place="$$('$(PYTHON)' tests/lab/vm.py --systemd-place)" && { [ -e "$$place" ] || tests/lab/systemd-root "$$place"; }

faults: $(READY)-test  ## a fault of every kind at every step of a handover, under every manager; minutes
	@PYTHONPATH=tests $(BIN)/python -P -m matrix --jobs $(JOBS) $(ARGS)

demo: $(READY)-test  ## the whole story on this machine
	@$(BIN)/luoctl demo $(ARGS)

bench: $(READY)-test $(BENCH)  ## numbers, beside a bare C program
	@PYTHONPATH=tests $(BIN)/python benchmarks/bench.py --fdmove $(BENCH) $(ARGS)

fuzz: $(READY)-fuzz  ## each target for FUZZ_S seconds under a fuzzer; what breaks one is kept in .fuzz
	@for target in $(TARGETS); do echo "make: $$target"; PYTHONPATH=tests $(BIN)/python tests/fuzzing.py $$target $(FUZZ_S) || exit 1; done

golden: $(READY)-test  ## the golden files of new versions; see tests/golden/make.py
	@PYTHONPATH=tests $(BIN)/python -m golden.make $(ARGS)

soak: $(READY)-test  ## whether anything is ever lost; ARGS='--seconds 600 --host supervised --seed 7'
	@PYTHONPATH=tests $(BIN)/python -m soak $(ARGS)

lint: $(CHECKS)  ## every static check; -k goes on after one that fails

check-ruff: $(READY)-lint
	$(BIN)/ruff check .

check-format: $(READY)-lint
	$(BIN)/ruff format --check .

check-mypy: $(READY)-lint
	$(BIN)/mypy protocol luod client tests benchmarks docs examples

check-pyright: $(READY)-lint
	$(BIN)/pyright

check-imports: $(READY)-lint
	$(BIN)/lint-imports --no-logo

install-systemd:  ## what is in systemd/, for a luod in PREFIX/bin; below DESTDIR
	@install -d $(ETC)/systemd/system $(ETC)/sysusers.d $(ETC)/tmpfiles.d $(ETC)/udev/rules.d $(ETC)/luod
	@install -m 644 systemd/luod-*.socket systemd/luod.service $(ETC)/systemd/system/
	@sed -i 's|^\(Exec[A-Za-z]*=\)/usr/|\1$(PREFIX)/|' $(ETC)/systemd/system/luod.service
	@install -m 644 systemd/luod-sysusers.conf $(ETC)/sysusers.d/luod.conf
	@install -m 644 systemd/luod-tmpfiles.conf $(ETC)/tmpfiles.d/luod.conf
	@install -m 644 systemd/60-luod.rules $(ETC)/udev/rules.d/
	@[ -e $(ETC)/luod/luod.toml ] || install -m 644 systemd/luod.toml $(ETC)/luod/

clean:
	@rm -rf $(VENV) .fuzz benchmarks/build build dist .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY)-test: pyproject.toml
	@command -v '$(PYTHON)' >/dev/null || { \
	    echo "make: there is no $(PYTHON): install the Debian package python3, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: $(PYTHON) is $$('$(PYTHON)' -V 2>&1), luod needs 3.11 or later:" \
	        "say make PYTHON=/path/to/python3.11 (Debian 12 and later have it as python3)" >&2; exit 1; }
	@'$(PYTHON)' -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "make: $(PYTHON) can't make a virtual environment (venv or ensurepip is missing):" \
	        "install the Debian package python3-venv" >&2; exit 1; }
	@echo "make: setting up $(VENV) with $$('$(PYTHON)' -V)"
	@version='import sys; print(sys.version)'; \
	    if [ "$$($(BIN)/python -c "$$version" 2>/dev/null)" != "$$('$(PYTHON)' -c "$$version")" ]; then '$(PYTHON)' -m venv --clear $(VENV); fi
	@rm -f $(VENV)/ready-*
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(READY)-lint: $(READY)-test
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	@touch $@

$(READY)-fuzz: $(READY)-test
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,fuzz]'
	@touch $@

$(BENCH): benchmarks/c/fdmove.c
	@command -v $(CC) >/dev/null || { echo "make: there is no $(CC): install the Debian packages gcc and libc6-dev" >&2; exit 1; }
	@mkdir -p $(@D)
	@$(CC) $(CFLAGS) $(WARNINGS) -o $@ $<
