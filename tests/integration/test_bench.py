"""The benchmarks run from end to end; their figures are for reading, not for passing."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment


@pytest.mark.integration
@pytest.mark.parametrize("words", [(), ("--resume",), ("--memory",)], ids=["throughput", "resume", "memory"])
def test_the_data_benchmark_runs(tmp_path, words):
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "bench/data.py"), "--quick", "--json", str(file), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment({}), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found = json.loads(file.read_text())
    if not words:
        rates = {(row["shards"], row["name"]): row["images_per_cpu_second"] for row in found["rows"]}
        assert {name for _, name in rates} >= {"(a) ours", "(b) usual", "(c) limit", "(b) usual + RandAugment"}
        assert min(rates.values()) > 0
    elif words == ("--resume",):
        assert set(found["seconds_at_percent"]) == {"0", "10", "50", "90"}
    else:
        assert len(found["resident_mib"]) == 3
