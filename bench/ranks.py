"""What bench/engine.py and bench/checkpoint.py share: starting ranks, and a run as `pipeline/train.py` has it."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.build import Run, build
from pipeline.config import CONFIG_FOLDER, load_config
from pipeline.run_dir import RunDir
from pipeline.runtime import Ranks, StopSignal, export_ranks, read_ranks

STRATEGIES: dict[str, int | None] = {"ddp": None, "zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}


def parser_for(doc: str | None) -> argparse.ArgumentParser:
    """With the options that both benchmarks know."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes; one for each GPU where there are any (2)")
    parser.add_argument("--only", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), metavar="STRATEGY",
                        help="of " + ", ".join(STRATEGIES))  # fmt: skip
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="no: fp32 (no)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: shows that it runs")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)  # this process is one of the ranks
    return parser


def launch(script: str, words: Sequence[str], ranks: int, folder: str) -> Any:
    """Runs a script on so many ranks by torchrun. Returns what its rank 0 has left by `leave`.

    The ranks share the cores evenly. Ends this process with torchrun's code where that is not 0.
    """
    threads = max((os.cpu_count() or 1) // ranks, 1)
    quiet = "ignore::FutureWarning,ignore::UserWarning"  # of DeepSpeed's and torch's own code
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": quiet}
    own = tempfile.mkdtemp(dir=folder)
    command = [
        sys.executable, "-m", "pipeline.launcher", "torchrun", f"--nproc-per-node={ranks}", script, *words,
        "--worker", own,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment)
    if done.returncode:
        sys.exit(done.returncode)
    with open(os.path.join(own, "figures.json")) as file:
        return json.load(file)


def leave(folder: str, figures: Any) -> None:
    with open(os.path.join(folder, "figures.json"), "w") as file:
        json.dump(figures, file)


def join() -> Ranks:
    ranks = read_ranks(os.environ)
    export_ranks(ranks, os.environ)
    return ranks


def open_run(folder: str, ranks: Ranks, overrides: Sequence[str]) -> Run:
    """A run of the embedded digits that `build` has made ready; nothing is logged, evaluated or saved by itself.

    `folder` is this launch's; the digits lie beside it, for all launches.
    """
    words = [
        f"data.train={os.path.dirname(folder)}/digits/train-{{000..003}}.tar", "data.val=[]", "data.workers=0",
        f"run.dir={folder}/run", "run.epochs=null", "run.steps=1000000", "monitor=[]",
        "augment.train=[resize]", "objective.label_smoothing=0", "schedule.peak_lr=1e-5",
        "checkpoint.every_steps=1000000", *overrides,
    ]  # fmt: skip
    config = load_config(os.path.join(CONFIG_FOLDER, "digits.yaml"), words)
    assert config.run.dir is not None
    return build(config, ranks, StopSignal(), RunDir(config.run.dir))


def close_run(run: Run) -> None:
    run.trainer.close()
    run.engine.barrier()
    run.run_dir.close()
    run.engine.close()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def state_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """What a rank holds between steps: the model's weights as they lie there, master weights, and moments."""
    weights = [getattr(p, "ds_tensor", p).detach() for p in module.parameters()]
    held = {t.untyped_storage().data_ptr() for t in weights}
    # ZeRO-3 empties the groups between steps, and keeps the tensors as keys of the moments.
    updated = [*(p for group in optimizer.param_groups for p in group["params"]), *optimizer.state]
    others = {p.data_ptr(): p.detach() for p in updated if p.untyped_storage().data_ptr() not in held}
    master = [p for p in others.values() if p.numel()]
    moments = [t for slots in optimizer.state.values() for t in slots.values() if isinstance(t, Tensor) and t.dim()]
    return {"weights": weights, "master": master, "moments": moments}


def spread(values: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def clock(device: torch.device) -> float:
    wait(device)
    return time.perf_counter()
