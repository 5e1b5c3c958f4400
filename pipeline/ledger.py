"""What became of the samples: `quarantine.jsonl` names the bad ones, `samples-rank<N>.jsonl`, if wanted, all."""

import os
from collections import Counter
from typing import Any

from pipeline.data.loader import Bad, Batch
from pipeline.engine import Engine
from pipeline.monitor.jsonl import Lines, read_lines


class Ledger:
    """Keeps the account of one run. Bad samples are gathered on rank 0, which writes them down.

    `quarantine.jsonl` has one line for each bad sample, with the step at which it was found first. Its lines are what
    is counted: a sample that is bad in every epoch counts once. Where shards are drawn with replacement, there are no
    epochs, and each bad row has a line.
    """

    def __init__(
        self, engine: Engine, run_dir: str, max_bad_fraction: float, log_samples: bool,
        train_samples: int | None, val_samples: int,
    ):  # fmt: skip
        self.engine, self.max_bad_fraction = engine, max_bad_fraction
        self.train_samples, self.val_samples = train_samples, val_samples  # None: drawn with replacement
        self.quarantine = os.path.join(run_dir, "quarantine.jsonl")
        self.bad = Lines(self.quarantine)
        self.log = Lines(os.path.join(run_dir, f"samples-rank{engine.ranks.rank}.jsonl")) if log_samples else None
        self.found: list[dict[str, Any]] = []  # on this rank since the last `settle`
        # On rank 0; the limit on bad samples bounds them, too.
        self.known: set[tuple[Any, ...]] = set()
        self.by_rank: Counter[int] = Counter()  # bad training samples, by the rank that found them first
        if engine.ranks.is_main:
            for entry in read_lines(self.quarantine):
                self._count(entry)

    @property
    def total(self) -> int:
        """Bad training samples (drawn with replacement: bad rows) of the whole run; on rank 0."""
        return self.by_rank.total()

    def add(self, step: int, batch: Batch) -> None:
        """Takes down the rows of global batch `step`."""
        if self.log is not None:
            self.log.write({"step": step + 1, "samples": batch.keys})
        self.note(step + 1, "train", batch.bad)

    def note(self, step: int, split: str, bad: list[Bad]) -> None:
        for sample in bad:
            entry = {"step": step, "split": split, "rank": self.engine.ranks.rank, "sample": sample.where}
            entry |= {"reason": sample.reason}
            if split == "train" and self.train_samples is not None:
                entry["place"] = sample.place  # the shards may move, data.val may change
            self.found.append(entry)

    def settle(self, step: int) -> str | None:
        """Writes down what all ranks have found since the last call. Collective.

        Returns what to tell the user where there are more bad samples than the config allows.
        """
        found = [entry for entries in self.engine.gather_objects(self.found) for entry in entries]
        self.found = []
        problem = self._record(step, found) if self.engine.ranks.is_main else None
        return self.engine.gather_objects(problem)[0]

    def _record(self, step: int, found: list[dict[str, Any]]) -> str | None:
        for entry in found:
            if self._count(entry):
                self.bad.write(entry)
        self.bad.flush()
        rows = step * self.engine.plan.global_batch
        train, val = ([entry for entry in found if entry["split"] == split] for split in ("train", "val"))
        for split, entries, count, samples in (
            ("training", train, self.total, self.train_samples or rows),
            ("validation", val, len(val), self.val_samples),
        ):
            if entries and count > self.max_bad_fraction * samples:
                last = entries[-1]
                what = "samples" if split == "validation" or self.train_samples is not None else "rows"
                return (
                    f"{last['sample']}: {last['reason']} (rank {last['rank']}, step {last['step']}); {count} of"
                    f" {samples} {split} {what} are bad by now, data.max_bad_fraction={self.max_bad_fraction:g} allows"
                    f" {int(self.max_bad_fraction * samples)}; {self.quarantine} lists them: mend or remove them, or"
                    " raise data.max_bad_fraction to train on with such rows masked"
                )
        return None

    def _count(self, entry: dict[str, Any]) -> bool:
        """Counts a bad sample. False: it was known."""
        split, sample = entry.get("split"), entry.get("sample")
        if split == "val" or self.train_samples is not None:
            identity = (split, *(entry.get("place") or [sample]))
            if identity in self.known:
                return False
            self.known.add(identity)
        if split == "train":
            self.by_rank[entry.get("rank", 0)] += 1
        return True

    def logs(self) -> list[Lines]:
        """Those that this rank writes."""
        return [*([self.bad] if self.engine.ranks.is_main else []), *([self.log] if self.log else [])]

    def flush(self) -> None:
        """Before a checkpoint: what lies before it is not repeated after a crash."""
        self.bad.flush()
        if self.log is not None:
            self.log.flush()
