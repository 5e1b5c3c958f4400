"""What became of the samples: `quarantine.jsonl` names the bad ones, `samples-rank<N>.jsonl`, if wanted, all."""

import glob
import json
import os
from collections import Counter
from typing import Any

from pipeline.data.loader import Batch
from pipeline.engine import Engine
from pipeline.monitor.jsonl import Lines, drop_lines_after


class Ledger:
    """Keeps the account of one run. Bad samples are gathered on rank 0, which writes them down."""

    def __init__(self, engine: Engine, run_dir: str, start_step: int, max_bad_fraction: float, log_samples: bool):
        self.engine, self.max_bad_fraction = engine, max_bad_fraction
        self.quarantine = os.path.join(run_dir, "quarantine.jsonl")
        self.bad = Lines(self.quarantine)
        self.log = Lines(os.path.join(run_dir, f"samples-rank{engine.ranks.rank}.jsonl")) if log_samples else None
        self.found: list[dict[str, Any]] = []
        self.total = 0
        self.by_rank: Counter[int] = Counter()  # since this start
        if engine.ranks.is_main:  # also of ranks that there were more of before
            for path in [self.quarantine, *glob.glob(os.path.join(run_dir, "samples-rank*.jsonl"))]:
                drop_lines_after(path, start_step)
            self.total = len(self._written("train"))
        engine.barrier()

    def add(self, step: int, batch: Batch) -> None:
        """Takes down the rows of global batch `step`."""
        if self.log is not None:
            self.log.write({"step": step + 1, "samples": batch.keys})
        self.note(step + 1, "train", batch.bad)

    def note(self, step: int, split: str, bad: list[tuple[str, str]]) -> None:
        for where, reason in bad:
            rank = self.engine.ranks.rank
            self.found.append({"step": step, "split": split, "rank": rank, "sample": where, "reason": reason})

    def settle(self, split: str, of_samples: int) -> str | None:
        """Writes down what all ranks have found since the last call. Collective.

        Returns what to tell the user where the bad samples are more than the config allows among `of_samples`.
        """
        gathered = self.engine.gather_objects((self.total, self.found))
        before, found = gathered[0][0], [entry for _, entries in gathered for entry in entries]
        self.found = []
        if split == "train":
            self.total = before + len(found)
            self.by_rank.update(entry["rank"] for entry in found)
        if found and self.engine.ranks.is_main:
            known = set(self._written(split)) if split == "val" else set()
            for entry in found:
                if entry["sample"] not in known:
                    self.bad.write(entry)
            self.bad.flush()
        count = self.total if split == "train" else len(found)
        if not found or count <= self.max_bad_fraction * of_samples:
            return None
        last = found[-1]
        return (
            f"{last['sample']}: {last['reason']} (rank {last['rank']}, step {last['step']}; {count} bad {split} samples"
            f" by now, data.max_bad_fraction={self.max_bad_fraction:g} allows"
            f" {int(self.max_bad_fraction * of_samples)}; all are listed in {self.quarantine}); mend or remove them,"
            " or raise data.max_bad_fraction to train on with such rows masked"
        )

    def _written(self, split: str) -> list[str]:
        """The bad samples that the file names, one for each time that they came."""
        try:
            with open(self.quarantine) as file:
                entries = [json.loads(line) for line in file]
        except FileNotFoundError:
            return []
        return [entry["sample"] for entry in entries if entry["split"] == split]

    def flush(self) -> None:
        """Before a checkpoint: what lies before it is not repeated after a crash."""
        self.bad.flush()
        if self.log is not None:
            self.log.flush()
