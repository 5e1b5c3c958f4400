"""Mixup and CutMix: what a row becomes, the same on any number of ranks, and the distributions of the papers."""

import json
import math

import numpy as np
import pytest
import torch

from pipeline.config import load_config
from pipeline.data.mix import MixConfig, check_blocks, draw_block, mix
from pipeline.data.order import MIX
from pipeline.errors import UserError
from pipeline.objectives.classification import Config
from tests.conftest import ROOT, SMALL, data, train, two_ranks

CLASSES, SIZE, SEED, STEP = 5, 16, 3, 11
BOTH = MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0)
CONFIGS = {
    "both": BOTH,
    "mixup": MixConfig(mixup_alpha=0.5),
    "cutmix": MixConfig(cutmix_alpha=1.0, block_rows=4),
    "sometimes": MixConfig(mixup_alpha=0.2, cutmix_alpha=1.0, probability=0.6, switch_probability=0.3, block_rows=2),
    "odd": MixConfig(mixup_alpha=1.0, cutmix_alpha=1.0, block_rows=3),
}


def batch(rows, invalid=()):
    generator = torch.Generator().manual_seed(rows)
    valid = torch.ones(rows, dtype=torch.bool)
    valid[list(invalid)] = False
    images = torch.rand(rows, 3, SIZE, SIZE, generator=generator) * 2 - 1
    return images, torch.randint(0, CLASSES, (rows,), generator=generator), valid


def mixed(images, labels, valid, config, first_row=0, step=STEP):
    return mix(images, labels, valid, CLASSES, config, seed=SEED, step=step, first_row=first_row)


def row_by_row(images, labels, valid, config, first_row=0):
    result, targets = images.clone(), torch.zeros(len(images), CLASSES)
    for row in range(len(images)):
        block = (first_row + row) // config.block_rows
        partner = (block * config.block_rows - first_row) * 2 + config.block_rows - 1 - row
        weight, top, bottom, left, right, share = draw_block(config, SIZE, SEED, MIX, STEP, block)
        if not (valid[row] and valid[partner]):
            targets[row, labels[row]] = 1
            continue
        result[row] = weight * images[row] + (1 - weight) * images[partner]
        result[row, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
        targets[row, labels[row]] += share
        targets[row, labels[partner]] += 1 - share
    return result, targets


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("invalid", [(), (0, 7, 30, 31)], ids=["all valid", "some masked"])
def test_mixing_equals_a_loop_over_rows(name, invalid):
    config = CONFIGS[name]
    images, labels, valid = batch(48, invalid)
    first_row = 10 * config.block_rows
    found, targets = mixed(images, labels, valid, config, first_row)
    expected, expected_targets = row_by_row(images, labels, valid, config, first_row)
    assert not torch.equal(found, images)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(targets, expected_targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(48))
    assert targets.dtype == torch.float32


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 16), (2, 32), (2, 8), (4, 16)])
def test_ranks_and_micro_batches_mix_the_same(ranks, micro_batch):
    images, labels, valid = batch(64, invalid=(5, 63))
    whole, whole_targets = mixed(images, labels, valid, BOTH)
    rows = 64 // ranks
    for rank in range(ranks):
        for begin in range(rank * rows, (rank + 1) * rows, micro_batch):
            part = slice(begin, begin + micro_batch)
            found, targets = mixed(images[part], labels[part], valid[part], BOTH, first_row=begin)
            assert torch.equal(found, whole[part])
            assert torch.equal(targets, whole_targets[part])


def test_step_and_seed_decide_the_draw():
    images, labels, valid = batch(16)
    first = mixed(images, labels, valid, BOTH)[0]
    assert torch.equal(mixed(images, labels, valid, BOTH)[0], first)
    assert not torch.equal(mixed(images, labels, valid, BOTH, step=STEP + 1)[0], first)
    assert not torch.equal(mixed(images, labels, valid, BOTH, first_row=16)[0], first)


def test_a_row_with_a_masked_partner_stays_as_it_is():
    images, labels, valid = batch(8, invalid=(2,))
    found, targets = mixed(images, labels, valid, MixConfig(mixup_alpha=1.0))
    assert [row for row in range(8) if torch.equal(found[row], images[row])] == [2, 5]
    assert targets[5, labels[5]] == 1


def test_without_mixing_nothing_changes():
    images, labels, valid = batch(16)
    found, targets = mixed(images, labels, valid, MixConfig(mixup_alpha=1.0, cutmix_alpha=1.0, probability=0.0))
    assert torch.equal(found, images)
    assert torch.equal(targets, torch.nn.functional.one_hot(labels, CLASSES).float())
    assert not MixConfig().on, "mixing must be off by default"


def test_lower_precision_and_memory_format_are_kept():
    images, labels, valid = batch(8)
    half = images.to(torch.bfloat16).to(memory_format=torch.channels_last)
    found, targets = mixed(half, labels, valid, BOTH)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(found.float(), mixed(images, labels, valid, BOTH)[0], atol=0.02, rtol=0)


def draws(config, count=4000, size=224):
    return np.array([draw_block(config, size, 0, MIX, 0, block) for block in range(count)])


def distance_to_beta(shares, alpha):
    """The Kolmogorov-Smirnov distance, by summing Beta's density."""
    x = (np.arange(200_000) + 0.5) / 200_000
    density = np.exp((alpha - 1) * (np.log(x) + np.log1p(-x)) + math.lgamma(2 * alpha) - 2 * math.lgamma(alpha))
    cumulative = np.cumsum(density) / density.sum()
    ranks = (np.arange(len(shares)) + 0.5) / len(shares)
    return np.abs(np.interp(np.sort(shares), x, cumulative) - ranks).max()


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0, 3.0])
def test_shares_of_mixup_are_beta_distributed(alpha):
    shares = draws(MixConfig(mixup_alpha=alpha))[:, 5]
    bound = 1.63 / math.sqrt(len(shares))  # of the Kolmogorov-Smirnov test at 1 %
    assert distance_to_beta(shares, alpha) < bound
    assert distance_to_beta(shares, alpha * 1.3) > bound


def test_boxes_of_cutmix_cover_what_the_targets_say():
    found = draws(MixConfig(cutmix_alpha=1.0))
    weight, top, bottom, left, right, share = found.T
    assert (weight == 1).all()
    assert (found[:, 1:5] >= 0).all()
    assert (found[:, 1:5] <= 224).all()
    np.testing.assert_allclose(share, 1 - (bottom - top) * (right - left) / 224**2)
    inside = (top > 0) & (bottom < 224) & (left > 0) & (right < 224)
    assert 0.1 < inside.mean() < 0.5, "boxes are clipped at the border, centres lie everywhere"
    np.testing.assert_array_equal((bottom - top)[inside], (right - left)[inside])
    assert np.abs((top + bottom)[inside].mean() / 2 - 112) < 3


def test_probabilities_are_those_of_the_config():
    found = draws(MixConfig(mixup_alpha=1.0, cutmix_alpha=1.0, probability=0.7, switch_probability=0.25))
    untouched = found[:, 5] == 1
    cut = (found[:, 0] == 1) & ~untouched
    assert untouched.mean() == pytest.approx(0.3, abs=0.03)
    assert cut.sum() / (~untouched).sum() == pytest.approx(0.25, abs=0.03)


def test_a_micro_batch_that_cuts_blocks_is_refused_with_the_nearest_that_does_not():
    check_blocks(BOTH, 16, 64)
    check_blocks(MixConfig(), 5, 5)
    with pytest.raises(UserError, match=r"blocks of 8.*micro batch of 12 \(of 48.*micro_batch_size.*: 8, 16; or set"):
        check_blocks(BOTH, 12, 48)
    with pytest.raises(UserError, match=r"micro batch of 20 \(of 20 rows.*nearest rows of a rank: 16, 24; or set"):
        check_blocks(BOTH, 20, 20)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mix.mixup_alpha=-1", "mix.mixup_alpha: must not be negative"),
        ("mix.switch_probability=2", "mix.switch_probability: must lie in"),
        ("mix.block_rows=1", "mix.block_rows: must be at least 2"),
    ],
)
def test_options_that_make_no_sense_are_named(override, message):
    with pytest.raises(UserError, match=message):
        load_config(str(ROOT / "configs/digits.yaml"), [override])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_losses_of_soft_targets_equal_torch(loss, smoothing):
    logits, labels = torch.randn(6, 7, dtype=torch.float64) * 4, torch.tensor([0, 6, 3, 3, 1, 2])
    hard = torch.nn.functional.one_hot(labels, 7).double()
    objective = Config(loss=loss, label_smoothing=smoothing)
    torch.testing.assert_close(objective.per_row(logits, labels, hard), objective.per_row(logits, labels))
    targets = 0.3 * hard + 0.7 * hard.flip(0)
    smooth = targets * (1 - smoothing) + smoothing / 7
    f = torch.nn.functional
    if loss == "softmax":
        expected = f.cross_entropy(logits, smooth, reduction="none")
    else:
        expected = f.binary_cross_entropy_with_logits(logits, smooth, reduction="none").sum(1)
    torch.testing.assert_close(objective.per_row(logits, labels, targets), expected)


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


MIXING = ["mix.mixup_alpha=0.8", "mix.cutmix_alpha=1.0", "run.steps=4"]


def test_a_run_that_cuts_blocks_is_refused_at_start(digits, tmp_path):
    code, output = train(*SMALL, *data(digits), f"run.dir={tmp_path}", *MIXING, "engine.micro_batch_size=4")
    assert code == 2, output
    assert "mix.block_rows: rows are mixed in blocks of 8" in output
    assert "Traceback" not in output


@pytest.mark.integration
def test_two_ranks_that_mix_have_the_losses_of_one(digits, tmp_path):
    for name, launcher, more in [
        ("plain", ("python",), ["mix.mixup_alpha=0", "mix.cutmix_alpha=0"]),
        ("one", ("python",), []),
        ("two", two_ranks(), ["engine.micro_batch_size=8"]),
    ]:
        words = [*SMALL, *data(digits), f"run.dir={tmp_path / name}", *MIXING, "run.steps=12", *more]
        code, output = train(*words, launcher=launcher)
        assert code == 0, output
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    assert losses(tmp_path / "one") != pytest.approx(losses(tmp_path / "plain"), abs=1e-3)
