"""Weights leave a run in every layout, and a run starts from them."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import checkpoint
from pipeline.build import build_model
from pipeline.config import ModelConfig, load_config, to_tree
from pipeline.engine import EngineConfig, TrainingState
from pipeline.errors import UserError
from pipeline.export import main
from pipeline.weights import fit_weights, read_weights
from tests.conftest import ROOT, SMALL, data, train
from tests.vit.test_model import assert_same_logits, randomize
from vit.model import ViT
from vit.weights import LAYOUTS

DIGITS = str(ROOT / "configs/digits.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with one checkpoint of the default model, with random weights in it, and the model."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config(DIGITS)
    model = randomize(build_model(config.model, config.engine, 0))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    moments = {key: {n: t.clone() for n, t in weights.items()} for key in ("exp_avg", "exp_avg_sq")}
    facts = {"config": to_tree(config), "classes": [f"digit {n}" for n in range(10)]}
    partial, final = str(folder / "checkpoints/.part"), str(folder / "checkpoints/step-00000005")
    files = checkpoint.write_share(partial, TrainingState(weights, moments, 5), 0, 1)
    checkpoint.complete(partial, final, files, {"step": 5, "updates": 5, "evaluation": {}, **facts})
    return folder, model


def test_the_hf_folder_opens_with_from_pretrained(run, tmp_path):
    from transformers import ViTForImageClassification

    folder, model = run
    assert main([str(folder), "--layout", "hf", "--out", str(tmp_path / "hf")]) == 0
    reference, info = ViTForImageClassification.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert reference.config.id2label[3] == "digit 3"
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_same_logits(model(images), reference.eval()(images).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_exported_file_fills_a_fresh_model_bit_by_bit(run, tmp_path, layout):
    folder, model = run
    out = tmp_path / {"hf": "folder", "jax": "vit.npz"}.get(layout, "vit.safetensors")
    assert main([str(folder / "checkpoints/step-00000005"), "--layout", layout, "--out", str(out)]) == 0
    written = out / "model.safetensors" if layout == "hf" else out
    (tmp_path / "like").touch()
    assert written.stat().st_mode == (tmp_path / "like").stat().st_mode, "readable by whom the user's umask says"
    filled = fit_weights(build_model(model.config, EngineConfig(), 1), str(out), new_head=False)
    assert all(torch.equal(tensor, filled[name]) for name, tensor in model.state_dict().items())


def test_files_of_torch_are_read_without_running_code(run, tmp_path):
    _, model = run
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "vit.pth")
    assert torch.equal(read_weights(str(tmp_path / "vit.pth"))["positions"], model.positions)
    torch.save({"model": print}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth: holds more than tensors"):
        read_weights(str(tmp_path / "evil.pth"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layout", "timm", "--out", "x.pth"], "--out x.pth: for the layout timm name a .safetensors file"),
        (["--layout", "hf", "--out", "x.safetensors"], "for the layout hf name a folder"),
        (["--layout", "timm", "--out", "/proc/no/x.safetensors"], "can't be written"),
    ],
)
def test_a_wrong_export_is_named(run, capsys, words, message):
    assert main([str(run[0]), *words]) == 2
    assert message in capsys.readouterr().err


def test_an_export_of_no_run_is_named(tmp_path, capsys):
    assert main([str(tmp_path), "--layout", "native", "--out", str(tmp_path / "x.safetensors")]) == 2
    assert f"error: {tmp_path}: no whole checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file of weights"),
        (b"", "can't be read as weights"),
        ("timm", r"(?s)model.init_from=.*missing blocks.0.attn.proj.bias 64.*missing norm.bias 64"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, content, message):
    path = tmp_path / "vit.safetensors"
    if content == "timm":
        save_file({"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        fit_weights(ViT(ModelConfig(**vars(load_config(DIGITS).model))), str(path), new_head=False)


def test_an_npz_is_read_as_it_is(tmp_path):
    np.savez(tmp_path / "vit.npz", **{"cls": np.ones((1, 1, 4), np.float32)})
    assert torch.equal(read_weights(str(tmp_path / "vit.npz"))["cls"], torch.ones(1, 1, 4))


def test_a_run_starts_from_exported_weights(run, digits, tmp_path):
    folder, model = run
    out = str(tmp_path / "vit.safetensors")
    assert main([str(folder), "--layout", "timm", "--out", out]) == 0
    words = [*SMALL, *data(digits), f"run.dir={tmp_path / 'run'}", "run.steps=1", "schedule.peak_lr=0"]
    code, output = train(*words, "model.init_from=nowhere.safetensors")
    assert code == 2
    assert "nowhere.safetensors: no such file of weights" in output
    code, output = train(*words, f"model.init_from={out}")  # in the same directory: nothing was begun there
    assert code == 0, output
    trained = load_file(tmp_path / "run/checkpoints/step-00000001/model-00001-of-00001.safetensors")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    code, output = train("--dry-run", *words, f"model.init_from={out}")
    assert code == 0, output
    assert f"starts from {out}: every tensor fits" in output
    code, output = train("--dry-run", *words, f"model.init_from={out}", "model.num_classes=12")
    assert code == 2
    assert "model.new_head=true starts with a fresh head" in output
