"""Every strategy, precision and number of ranks trains the same, and resumes what any other has saved.

Adam divides by the size of a gradient: an epsilon above the rounding of vanishing ones keeps it from being blown up.
Four launches of torchrun (1, 2, 4 and again 1 rank) play all cells one after another (matrix.py): each cell trains six
steps of batch 64 in micro batches of 8, with clipping and a moving average, and saves after steps 4 and 6.
"""

import json
import subprocess

import pytest
import torch

from pipeline import checkpoint
from pipeline.engine import LossScale
from tests.conftest import ROOT, environment, free_port

TINY = ["run.epochs=null", "run.steps=6", "run.log_every_steps=1", "data.workers=0", "data.log_samples=true",
        "monitor=[jsonl]", "model.width=32", "model.depth=2", "model.heads=2", "model.mlp_dim=64",
        "schedule.warmup_steps=1", "schedule.peak_lr=2e-2", "optimizer.eps=1e-5", "optimizer.ema_decay=0.9",
        "engine.grad_clip=0.5", "engine.micro_batch_size=8", "checkpoint.every_steps=4",
        "checkpoint.keep_last=9"]  # fmt: skip
STRATEGIES = ["null", "0", "1", "2", "3"]
CELLS = [f"{ranks}-{stage}-{precision}" for ranks in (1, 2, 4) for stage in STRATEGIES for precision in ("no", "bf16")]
SGD = ["optimizer.name=sgd", "optimizer.layer_decay=0.7", "schedule.peak_lr=0.3"]
MORE = {  # beside the matrix: cell -> its own options
    "2-1-no-offload": ["engine.offload_optimizer=true"],
    "2-2-bf16-offload": ["engine.offload_optimizer=true"],
    "2-3-bf16-offload": ["engine.offload_optimizer=true"],
    "2-2-bf16-half": ["engine.reduce_precision=half"],
    "1-null-no-sgd": SGD,
    "2-null-no-sgd": SGD,
    "2-0-no-sgd": SGD,
    "2-2-no-sgd": SGD,
    "2-3-no-sgd": SGD,
}
# Saved by the first, gone on with after step 4 by the second: every strategy, precision and number of ranks on both
# sides, and to the same topology (whose continuation must be the same bit for bit).
PAIRS = [
    ("1-null-no", "2-3-no"), ("1-0-bf16", "2-1-bf16"), ("1-3-no", "2-null-no"), ("1-2-bf16", "4-0-bf16"),
    ("2-1-no", "4-2-no"), ("2-2-no", "4-3-no"), ("2-3-bf16", "4-null-bf16"), ("2-0-no", "4-1-no"),
    ("2-null-bf16", "4-2-bf16"), ("4-3-no", "1-0-no"), ("4-2-bf16", "1-1-bf16"), ("4-1-no", "1-2-no"),
    ("4-null-no", "1-3-no"), ("4-0-bf16", "1-null-no"), ("2-2-bf16-offload", "4-2-bf16"), ("1-1-no", "2-1-no-offload"),
    ("2-2-no-sgd", "2-3-no-sgd"), ("2-3-no-sgd", "2-0-no-sgd"),
]  # fmt: skip
SAME = [f"2-{stage}-{precision}" for stage in STRATEGIES for precision in ("no", "bf16")]
SAME += ["4-null-no", "4-null-bf16", "4-1-no", "4-2-no", "4-3-no"]
CELLS += [f"{ranks}-{stage}-fp16" for ranks in (1, 2, 4) for stage in (1, 2, 3)]  # DDP has fp16 on GPUs only
OVERFLOW = "2-2-fp16-overflow"
MORE[OVERFLOW] = [f"engine.initial_loss_scale={2**22}"]  # far too high at first
PAIRS += [("1-1-fp16", "2-2-fp16"), ("2-2-fp16", "4-3-fp16"), ("2-3-fp16", "4-null-no"), ("2-null-no", "4-1-fp16")]
SAME += ["2-1-fp16", "2-2-fp16", "2-3-fp16", "4-3-fp16", OVERFLOW]
TOLERANCE = {"no": 1e-5, "bf16": 5e-2, "fp16": 3e-2}  # of the loss, to one process in fp32 (sums in another order)
NORM_TOLERANCE = {"no": 1e-5, "bf16": 1e-2, "fp16": 1e-3}  # of the first gradient's norm, relative


def words(cell):
    _, stage, precision = cell.split("-")[:3]
    return [*TINY, *MORE.get(cell, []), f"engine.zero_stage={stage}", f"engine.precision={precision}"]


def resumed(source, target):
    return f"{source}-to-{target}"


def job(name, cell, copy_from=None):
    return {"name": name, "words": words(cell), "copy_from": copy_from}


@pytest.fixture(scope="module")
def matrix(digits, tmp_path_factory):
    """The folder of all runs, and what was said of each."""
    folder, said = tmp_path_factory.mktemp("matrix"), {}
    done: set[str] = set()
    cells, pairs = [*CELLS, *MORE], [*PAIRS, *((cell, cell) for cell in SAME)]
    for number, ranks in enumerate((1, 2, 4, 1)):
        mine = [cell for cell in cells if cell.startswith(f"{ranks}-") and cell not in done]
        done.update(mine)
        jobs = [job(cell, cell) for cell in mine]
        jobs += [
            job(resumed(source, target), target, source)
            for source, target in pairs
            if target.startswith(f"{ranks}-") and source in done and resumed(source, target) not in said
        ]
        plan = folder / f"jobs-{number}.json"
        plan.write_text(json.dumps(jobs))
        command = ["torchrun", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
        command += [str(ROOT / "tests/integration/matrix.py"), str(folder), str(digits), str(plan)]
        ran = subprocess.run(command, cwd=ROOT, env=environment({}), capture_output=True, text=True, timeout=900)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
        said |= {entry["name"]: entry for entry in found}
    return folder, said


def logged(run, name="loss"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line.get(name) for line in lines}


def samples(run):
    """The global batches, by step: ranks hold them one after another."""
    batches: dict[int, list[str]] = {}
    for path in sorted(run.glob("samples-rank*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            batches.setdefault(entry["step"], []).extend(entry["samples"])
    return {step: sorted(names) for step, names in batches.items()}


def assert_same_state(left, right):
    left, right = checkpoint.load(str(left)), checkpoint.load(str(right))
    assert (left.updates, left.loss_scale) == (right.updates, right.loss_scale)
    assert left.moments.keys() == right.moments.keys()
    for mine, theirs in ((left.weights, right.weights), *((left.moments[k], right.moments[k]) for k in left.moments)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.integration
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("cell", [cell for cell in (*CELLS, *MORE) if cell != OVERFLOW])
def test_every_cell_has_the_losses_of_one_process(matrix, cell):
    folder, _ = matrix
    precision = cell.split("-")[2]
    reference = "1-null-no-sgd" if cell.endswith("sgd") else "1-null-no"
    found = logged(folder / cell)
    assert found == pytest.approx(logged(folder / reference), abs=TOLERANCE[precision])
    assert abs(found[6] - found[1]) > 0.005, "the weights have moved"
    norms = [logged(folder / run, "grad_norm")[1] for run in (cell, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=NORM_TOLERANCE[precision])
    assert samples(folder / cell) == samples(folder / reference)
    if precision == "no":
        mine, theirs = (checkpoint.load(str(folder / run / "checkpoints/step-00000006")) for run in (cell, reference))
        for name in theirs.weights:  # also the moving average: nothing of a strategy is left in it
            torch.testing.assert_close(mine.weights[name], theirs.weights[name], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(mine.moments["ema"][name], theirs.moments["ema"][name], atol=2e-5, rtol=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_what_one_cell_saves_another_goes_on_with(matrix, source, target):
    folder, said = matrix
    run, entry = folder / resumed(source, target), said[resumed(source, target)]
    assert entry["start_step"] == 4
    assert entry["same"], "weights, moments and moving average after loading are those of the checkpoint, bit for bit"
    precisions = {cell.split("-")[2] for cell in (source, target)}
    reference = folder / source
    assert logged(run) == pytest.approx(logged(reference), abs=max(TOLERANCE[p] for p in precisions))
    assert samples(run) == samples(reference)


@pytest.mark.integration
@pytest.mark.parametrize("cell", SAME)
def test_on_the_same_ranks_a_resume_goes_on_bit_for_bit(matrix, cell):
    folder, said = matrix
    run, entry = folder / resumed(cell, cell), said[resumed(cell, cell)]
    assert (entry["start_step"], entry["same"]) == (4, True)
    assert logged(run) == logged(folder / cell)
    assert_same_state(run / "checkpoints/step-00000006", folder / cell / "checkpoints/step-00000006")


@pytest.mark.integration
def test_an_overflow_leaves_the_step_out_and_halves_the_loss_scale(matrix):
    folder, _ = matrix
    scales = logged(folder / OVERFLOW, "loss_scale")
    assert list(scales.values()) == [2.0**power for power in (22, 21, 20, 19, 18, 18)]
    assert [norm is None for norm in logged(folder / OVERFLOW, "grad_norm").values()] == [True] * 5 + [False]
    first, last = (checkpoint.load(str(folder / OVERFLOW / f"checkpoints/step-{step:08d}")) for step in (4, 6))
    assert (first.updates, first.loss_scale) == (0, LossScale(2.0**19, stable_steps=0, hysteresis=1))
    assert (last.updates, last.loss_scale) == (1, LossScale(2.0**18, stable_steps=1, hysteresis=1))
    assert all(torch.equal(first.moments["ema"][name], first.weights[name]) for name in first.weights)
    assert any(not torch.equal(last.weights[name], first.weights[name]) for name in first.weights)
