"""Run under torchrun: trains the same run under several strategies in one process group, and resumes between them.

Usage: matrix.py FOLDER DATA JOBS.json. JOBS is a list of {"name", "words", "copy_from"?}: each is a run in FOLDER/name
with these overrides, which goes on after step 4 of a copy of another run's directory where that is asked for. Rank 0
prints one JSON line a job: {"name", "start_step", "same": whether weights, moments and loss scale after loading are
those of the checkpoint bit for bit}.
"""

import json
import os
import shutil
import sys

import torch

from pipeline import checkpoint
from pipeline.build import build
from pipeline.config import load_config
from pipeline.run_dir import RunDir
from pipeline.runtime import StopSignal, export_ranks, read_ranks


def loaded_bit_for_bit(run):
    """Whether the engine holds what its newest checkpoint does."""
    path, _ = checkpoint.latest(run.run_dir.checkpoints)
    if path is None:
        return True
    saved, share = checkpoint.load(path), run.engine.whole(run.engine.state(), run.trainer.saver.group)
    pairs = [(share.weights, saved.weights)] + [(share.moments[k], saved.moments[k]) for k in run.engine.slots]
    same_scale = None in (share.loss_scale, saved.loss_scale) or share.loss_scale == saved.loss_scale
    same = (
        same_scale
        and share.updates == saved.updates
        and all(torch.equal(mine[name], theirs[name]) for mine, theirs in pairs for name in mine)
    )
    return all(run.engine.gather_objects(same))


def main():
    folder, shards, jobs = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))  # noqa: SIM115
    ranks = read_ranks(os.environ)
    export_ranks(ranks, os.environ)
    run = None
    for job in jobs:
        path = os.path.join(folder, job["name"])
        if job.get("copy_from") and ranks.is_main:
            shutil.copytree(os.path.join(folder, job["copy_from"]), path)
            checkpoint.Store(os.path.join(path, "checkpoints")).discard_after(4)
        words = [f"run.dir={path}", f"data.train={shards}/train-{{000..003}}.tar", "data.val=[]", *job["words"]]
        run = build(load_config("configs/digits.yaml", words), ranks, StopSignal(), RunDir(path))
        same, start = loaded_bit_for_bit(run), run.trainer.start_step
        run.trainer.fit()
        run.trainer.close()
        run.engine.barrier()
        if ranks.is_main:
            print(json.dumps({"name": job["name"], "start_step": start, "same": same}), flush=True)
        if job is not jobs[-1]:
            run.engine.release()
    run.engine.close()


if __name__ == "__main__":
    main()
