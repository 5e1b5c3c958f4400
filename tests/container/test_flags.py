"""README.md and docker/compose.yaml have the flags that run.sh tests containers with, and the base image is pinned."""

import re
import shlex

import pytest
import yaml

from tests.conftest import ROOT


def flags_of_run_sh():
    found = re.search(r"^hardening=\((.*)\)$", (ROOT / "tests/container/run.sh").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_readme_starts_containers_with_the_tested_flags():
    command = re.search(r"docker run (?:.*\\\n)*.*", (ROOT / "README.md").read_text())
    assert command is not None
    assert flags_of_run_sh() in " ".join(command[0].replace("\\\n", "").split())


@pytest.mark.parametrize("name", ["trainer", "tensorboard"])
def test_compose_starts_containers_with_the_tested_flags(name):
    service = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"][name]
    words = [f"--cap-drop {capability}" for capability in service["cap_drop"]]
    words += [f"--security-opt {option.removesuffix(':true')}" for option in service["security_opt"]]
    words += ["--read-only"] * (service["read_only"] is True)
    words += [f"--tmpfs {path}" for path in service["tmpfs"]]
    words.append(f"--pids-limit {service['pids_limit']}")
    assert shlex.split(" ".join(words)) == shlex.split(flags_of_run_sh())


def test_the_base_image_is_pinned_by_its_digest():
    base = re.search(r"^ARG BASE_IMAGE=(.*)$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    assert base is not None
    assert re.fullmatch(r"pytorch/pytorch:[\w.-]+@sha256:[0-9a-f]{64}", base[1])
