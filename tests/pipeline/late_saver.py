"""One of two ranks that vote in each step and save, as the training loop does: `late_saver.py FOLDER RANK`.

Rank 1 comes to its first checkpoint later than the savers' group waits. Later, its state is not finite.
"""

import os
import sys
import time

import torch
import torch.distributed as dist

from pipeline.checkpoint import CheckpointConfig, Saver, Store
from pipeline.engine import Engine, EngineConfig, TrainingState
from pipeline.errors import UserError
from pipeline.lease import acquire, observe
from pipeline.runtime import Ranks, StopSignal, Vote

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo")


class Savable(Engine):
    def __init__(self):
        self.ranks, self.config = Ranks(rank, 2, rank, 2), EngineConfig(timeout_seconds=2)
        self.device = torch.device("cpu")
        self.value, self.late = 1.0, 4.0

    def state(self, memory=None):
        return TrainingState({"ab"[rank]: torch.full((3,), self.value)}, {}, updates=1)

    def whole(self, state, group):
        if rank == 1:
            time.sleep(self.late)
        self.late = 0
        return state

    def loss_scale(self):
        return None


engine = Savable()
store, lease = Store(folder), observe(os.path.join(folder, ".run.lease-00000001"), folder)
if rank == 0:
    acquire(folder, "run", folder)
dist.barrier()
saver = Saver(CheckpointConfig(), store, engine, {}, lease)
vote = Vote(StopSignal(), engine.ranks, saver.wanted, saver.needs_all_ranks, 60)
saver.save(3, {})
renewed = False
while not renewed:
    vote.start(1)
    renewed = vote.finish().settle and saver.settle()
    time.sleep(0.02)
saver.save(5, {})
assert not saver.settle()
saver.finish()
print("saved step 5 after a new group", os.listdir(folder), flush=True)
engine.value = float("nan") if rank == 1 else 1.0
saver.save(7, {})
try:
    while True:
        vote.start(1)
        if vote.finish().settle:
            saver.settle()
        time.sleep(0.02)
except UserError as error:
    print(error, flush=True)
dist.destroy_process_group()
