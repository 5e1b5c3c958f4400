"""What the ranks write of a partitioned state is the whole of it, and as it was when it was copied."""

import json
import subprocess

import pytest

from tests.conftest import ROOT, environment, free_port


@pytest.mark.integration
@pytest.mark.parametrize(("stage", "precision"), [(1, "no"), (2, "bf16"), (2, "no"), (3, "no")])
def test_shares_are_what_deepspeed_has(stage, precision):
    command = ["torchrun", "--nproc-per-node", "3", "--master-port", str(free_port()),
               "tests/integration/share_guard.py", str(stage), precision]  # fmt: skip
    more = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment(more), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert [name for names in found["names"] for name in names] == found["all"]
    assert all(found["names"])
    assert found["wrong"] == [[], [], []]
    assert found["moved"]
