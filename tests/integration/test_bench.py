"""The benchmarks run from end to end; their figures are for reading, not for passing."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest

from pipeline.runtime import Agreement
from tests.conftest import ROOT, environment


def figures(folder, script, *words):
    """What a benchmark has written, and printed."""
    file = folder / "figures.json"
    command = [sys.executable, str(ROOT / f"bench/{script}.py"), "--quick", "--json", str(file), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment({}), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return json.loads(file.read_text()), done.stdout


@pytest.mark.integration
@pytest.mark.parametrize("words", [(), ("--resume",), ("--memory",)], ids=["throughput", "resume", "memory"])
def test_the_data_benchmark_runs(tmp_path, words):
    found, _ = figures(tmp_path, "data", *words)
    if not words:
        rates = {(row["shards"], row["name"]): row["images_per_cpu_second"] for row in found["rows"]}
        assert {name for _, name in rates} >= {"(a) ours", "(b) usual", "(c) limit", "(b) usual + RandAugment"}
        assert min(rates.values()) > 0
    elif words == ("--resume",):
        assert set(found["seconds_at_percent"]) == {"0", "10", "50", "90"}
    else:
        assert len(found["resident_mib"]) == 3


@pytest.mark.integration
def test_the_engine_benchmark_runs(tmp_path):
    found, printed = figures(tmp_path, "engine", "--only", "ddp", "zero2")
    ddp, zero = found["step"]
    assert set(ddp["seconds"]) == {"plain", "ours"}
    assert set(zero["seconds"]) == {"plain", "ours", "deepspeed"}
    assert min(*ddp["seconds"].values(), *zero["seconds"].values()) > 0
    parameters = found["measured"]["time"][0]["parameters"]
    # Data parallelism sums each gradient once, in fp32; what the ranks agree on are a few numbers of 8 bytes.
    expected = 4 * parameters + 8 * len(fields(Agreement))
    assert found["communication"][0]["payload"] == {"allreduce": expected}
    assert found["communication"][0]["sent"] == expected  # a ring of two
    ddp, zero = found["memory"]
    assert ddp["weights"] == 4 * parameters
    assert ddp["moments"] == 8 * parameters
    assert zero["moments"] == pytest.approx(4 * parameters, rel=0.01)  # each of two ranks has half
    assert "computed, not measured" in printed
    for row in found["computed_efficiency"]:
        values = [row[gpus] for gpus in ("8", "64", "1024")]
        assert 0 < values[2] <= values[1] <= values[0] < 1


@pytest.mark.integration
def test_the_checkpoint_benchmark_runs(tmp_path):
    found, _ = figures(tmp_path, "checkpoint", "--only", "ddp", "zero2")
    assert [(row["strategy"], row["way"]) for row in found["rows"]] == [
        (strategy, way) for strategy in ("ddp", "zero2") for way in ("ours", "torch.save", "dcp.async_save")
    ]
    for row in found["rows"]:
        assert min(row[f"{name}_seconds"] for name in ("copy", "stall", "load")) > 0
        assert row["background_seconds"] >= row["stall_seconds"]
    assert found["rows"][0]["state_mib"] == found["rows"][3]["state_mib"]
