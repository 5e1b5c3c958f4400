# Two commands do everything on a fresh machine (Python >= 3.11 with venv and pip): `make pretrain` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
OLDEST := $(CURDIR)/.venv/oldest
WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile

.PHONY: pretrain test check test-integration test-survival test-oldest test-cluster test-container sbom clean
pretrain: $(INSTALLED)  ## train a small ViT on the embedded data set
	@$(BIN)/accelerate launch --config_file launch/accelerate/one_process.yaml pipeline/train.py

test: check  ## style, types, layers and the default tests, under ten minutes
	$(PYTEST) --cov

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/shellcheck -x .ci/run launch/*.sh launch/pretrain.slurm launch/site.env.example $(wildcard tests/*/*.sh)
	$(BIN)/yamllint .pre-commit-config.yaml configs docker launch

test-integration: $(INSTALLED)  ## whole training runs: real launchers, DeepSpeed, kill and resume
	$(PYTEST) -m 'integration and not slow'

test-oldest: $(INSTALLED)  ## strategies and precisions with the oldest accelerate and deepspeed that pyproject.toml allows
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(OLDEST) $$($(BIN)/python tests/oldest.py)
	PYTHONPATH=$(OLDEST) $(PYTEST) -m integration tests/integration/test_numerics.py tests/integration/test_matrix.py

test-survival: $(INSTALLED)  ## fire drills, signals and kills at random moments, hangs, slow ranks
	$(PYTEST) -m 'survival and not slow'

test-container:  ## docker/Dockerfile: build, run and test it; needs docker, podman, or root on Debian
	tests/container/run.sh

test-cluster: $(INSTALLED)  ## jobs on a real Slurm cluster on this machine, and torchrun on two hosts (best as root)
	tests/cluster/install.sh
	$(PYTEST) -m cluster

sbom: $(INSTALLED)  ## build/sbom.cdx.json: the software bill of materials, in CycloneDX's format
	@mkdir -p build
	@PYTHONWARNINGS=ignore $(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --validate --output-reproducible \
	  --output-file build/sbom.cdx.json constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[deepspeed,digits,parquet,dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .coverage* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
