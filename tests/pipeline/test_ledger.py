"""What became of the samples: each bad one counts once, and no log has a step twice after a crash."""

import json
from types import SimpleNamespace

import pytest

from pipeline.data.loader import Bad
from pipeline.ledger import Ledger
from pipeline.monitor.jsonl import Lines, restore_logs

SAMPLES = 1000


class OneRank:
    """An engine of one rank, or of rank 0 beside ranks whose answers are known."""

    def __init__(self, *others):
        self.ranks = SimpleNamespace(rank=0, world_size=1 + len(others), is_main=True)
        self.plan = SimpleNamespace(global_batch=100)
        self.others = others

    def gather_objects(self, value):
        return [value, *self.others]

    def barrier(self):
        pass


def ledger(run, start_step=0, fraction=0.01, samples=SAMPLES, engine=None, log_samples=False):
    restore_logs(str(run), {}, start_step)
    return Ledger(engine or OneRank(), str(run), fraction, log_samples, samples, 50)


def bad(number, folder="/data"):
    return Bad(f"{folder}/train-000.tar: sample {number:05d}", "no image", (0, number))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_that_are_bad_in_every_epoch_count_once(tmp_path):
    account, step = ledger(tmp_path), 0
    for epoch in range(5):  # 0.2 % are bad, 1 % may be
        for _ in range(10):
            account.note(step + 1, "train", [bad(3), bad(700)] if step % 10 == 7 else [])
            step += 1
            assert account.settle(step) is None
        if epoch == 2:  # a resume
            account = ledger(tmp_path, step)
    assert account.total == 2
    assert [entry["step"] for entry in lines(tmp_path / "quarantine.jsonl")] == [8, 8]
    account.note(step, "train", [bad(number) for number in range(10)])
    assert "11 of 1000 training samples are bad" in account.settle(step)


def test_shards_that_have_moved_bring_no_new_bad_samples(tmp_path):
    account = ledger(tmp_path)
    account.note(1, "train", [bad(3)])
    account.settle(1)
    account = ledger(tmp_path, 1)
    account.note(2, "train", [bad(3, "/elsewhere"), bad(4, "/elsewhere")])
    account.settle(2)
    assert account.total == 2


def test_too_many_bad_samples_are_told_with_their_number_and_the_limit(tmp_path):
    account = ledger(tmp_path, fraction=0.002)
    account.note(4, "train", [bad(1), bad(2), bad(2), bad(3)])
    assert account.settle(4) == (
        "/data/train-000.tar: sample 00003: no image (rank 0, step 4); 3 of 1000 training samples are bad by now,"
        f" data.max_bad_fraction=0.002 allows 2; {tmp_path}/quarantine.jsonl lists them: mend or remove them, or raise"
        " data.max_bad_fraction to train on with such rows masked"
    )
    account = ledger(tmp_path, 4, fraction=0.002)  # started again with the same limit
    account.note(5, "train", [bad(1)])
    assert "3 of 1000" in account.settle(5)


def test_without_epochs_bad_rows_are_compared_with_the_rows_so_far(tmp_path):
    account = ledger(tmp_path, samples=None)
    for step in range(1, 8):  # 100 rows each, of which one is bad
        account.note(step, "train", [bad(3)])
        assert account.settle(step) is None
        if step == 4:
            account = ledger(tmp_path, step, samples=None)
    assert account.total == 7
    account.note(8, "train", [bad(3), bad(3)])
    assert "9 of 800 training rows are bad" in account.settle(8)


def test_bad_validation_samples_count_apart_and_in_each_evaluation(tmp_path):
    account = ledger(tmp_path, fraction=0.02)  # of 50 validation samples one
    for step in (10, 20):
        account.note(step, "train", [bad(step)])  # not settled yet when the evaluation is
        account.note(step, "val", [bad(1)])
        assert account.settle(step) is None
    assert account.total == 2
    assert [entry["split"] for entry in lines(tmp_path / "quarantine.jsonl")] == ["train", "val", "train"]
    account.note(30, "val", [bad(1), bad(2)])
    assert "2 of 50 validation samples are bad" in account.settle(30)


def test_the_ranks_that_found_them_add_up_to_the_bad_samples(tmp_path):
    other = [{"step": 1, "split": "train", "rank": 1, "sample": "x", "reason": "", "place": (0, 3)},
             {"step": 1, "split": "train", "rank": 1, "sample": "y", "reason": "", "place": (0, 4)}]  # fmt: skip
    account = ledger(tmp_path, engine=OneRank(other))
    account.note(1, "train", [bad(3)])
    found = account.engine.gather_objects(account.found)
    account._record(1, [entry for entries in found for entry in entries])
    assert dict(account.by_rank) == {0: 1, 1: 1}
    assert dict(ledger(tmp_path, 1).by_rank) == {0: 1, 1: 1}


@pytest.mark.parametrize("name", ["run", "run [1]*?"])
def test_a_start_drops_what_killed_processes_have_left_in_all_logs(tmp_path, name):
    run = tmp_path / name
    run.mkdir()
    for file in ("quarantine.jsonl", "samples-rank0.jsonl", "samples-rank11.jsonl"):
        whole = [json.dumps({"step": step, "split": "val", "samples": ["ä"]}) + "\n" for step in range(1, 6)]
        damaged = whole[1].encode()[:5] + b"\xff" + whole[1].encode()[5:]
        (run / file).write_bytes(
            b"".join([whole[0].encode(), damaged, "".join(whole[2:]).encode(), b'{"step": 6, "sa'])
        )
    account = ledger(run, 4, log_samples=True)
    for file in ("quarantine.jsonl", "samples-rank0.jsonl", "samples-rank11.jsonl"):
        assert [line["step"] for line in lines(run / file)] == [1, 3, 4], file
    account.log.write({"step": 5, "samples": []})
    account.flush()
    assert lines(run / "samples-rank0.jsonl")[-1]["step"] == 5


def test_lines_that_a_full_disk_cut_are_completed(tmp_path, monkeypatch, capfd):
    """The file takes ten bytes, then nothing, then all."""
    import errno
    import io

    taken = iter([10, None])

    class Disk(io.FileIO):
        def write(self, data):
            room = next(taken, len(data))
            if room is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:room])

    log = Lines(str(tmp_path / "log.jsonl"))
    monkeypatch.setattr("builtins.open", lambda path, mode, buffering, opener: Disk(path, "a", opener=opener))
    log.write({"step": 1})
    log.flush()
    log.write({"step": 2})
    log.flush()
    monkeypatch.undo()
    assert lines(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]
    told = capfd.readouterr().err
    assert told.count("No space left on device; tried again later") == 1
    assert told.count("can be written again") == 1
