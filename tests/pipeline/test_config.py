"""The config: one place for defaults, and a clear refusal of everything else."""

import ast
import dataclasses
import typing

import pytest
import yaml

from pipeline.config import (
    RunConfig,
    list_configs,
    load_config,
    plugin_config,
    plugin_names,
    to_tree,
    to_yaml,
)
from pipeline.errors import UserError
from tests.conftest import ROOT

DIGITS = str(ROOT / "configs/digits.yaml")


def test_every_config_file_reads_and_survives_a_round_trip(tmp_path):
    for name in list_configs():
        config = load_config(str(ROOT / name))
        assert yaml.safe_load(to_yaml(config)) == to_tree(config)
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert load_config(str(tmp_path / "config.yaml")) == config


def test_numbers_in_scientific_notation_are_numbers():
    assert load_config(DIGITS, ["schedule.peak_lr=1e-3"]).schedule.peak_lr == 1e-3


def test_a_variant_on_the_command_line_wins_over_the_file():
    config = load_config(DIGITS, ["model.variant=S/16"])
    assert (config.model.width, config.model.patch_size, config.model.num_classes) == (384, 16, 10)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.peak_lrr=1", "command line: schedule.peak_lrr: unknown key; did you mean 'schedule.peak_lr'?"),
        ("modle.width=1", "command line: modle: unknown key; did you mean 'model'?"),
        ("data.allow_pipe=true", "command line: data.allow_pipe: unknown key; did you mean 'data.read.allow_pipe'?"),
        ("data.workers=many", "command line: data.workers: expected a whole number, found 'many'"),
        ("model.qkv_bias=3", "command line: model.qkv_bias: expected true or false, found 3"),
        ("model.image_size=30", "model.image_size: 30 is no multiple of patch_size 8; the nearest that are: 24, 32"),
        ("engine.precision=fp8", "engine.precision: expected one of 'no', 'bf16', 'fp16', found 'fp8'"),
        ("engine.zero_stage=4", "engine.zero_stage: must be null, 0, 1, 2 or 3, found 4"),
        ("objective.name=clasification", "did you mean 'classification'"),
        ("augment.train=[resise]", "augment.train[0].name: unknown 'resise'; did you mean 'resize'?"),
        ("run.steps=5", "run.steps: set exactly one of steps (5) and epochs (60.0)"),
        ("nonsense", "'nonsense': expected key=value"),
        ("model.channels=1", "model.channels: the shards' images have 3 channels, found 1"),
        ("model.variant=B/15", "command line: model.variant: unknown 'B/15'"),
    ],
)
def test_what_is_wrong_is_named_with_its_fix(override, message):
    with pytest.raises(UserError) as caught:
        load_config(DIGITS, [override])
    assert message in str(caught.value)


def test_a_missing_config_lists_those_there_are():
    with pytest.raises(UserError, match=r"no.yaml: config not found.*configs/digits.yaml"):
        load_config("no.yaml")


def test_every_plugin_can_be_built():
    for package in ("data.augment", "objectives", "monitor"):
        assert plugin_names(package)
        for name in plugin_names(package):
            assert dataclasses.is_dataclass(plugin_config(package, name)())


def attributes_read():
    """Names of all attributes that the packages' code reads."""
    for package in ("vit", "pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    yield node.attr


def options(cls):
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            yield from options(hint)
        yield field.name


def test_every_option_is_read_somewhere():
    read = set(attributes_read())
    plugins = [plugin_config(p, name) for p in ("data.augment", "objectives", "monitor") for name in plugin_names(p)]
    unread = {name for cls in [RunConfig, *plugins] for name in options(cls)} - read
    assert not unread


def test_no_module_hides_one_of_the_standard_library():
    import sys

    names = {path.stem for path in (ROOT / "pipeline").iterdir()}
    assert not names & set(sys.stdlib_module_names)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan"])
@pytest.mark.parametrize("key", ["schedule.peak_lr", "engine.grad_clip", "health.hang_seconds", "run.epochs"])
def test_numbers_that_are_not_finite_are_refused(key, value):
    with pytest.raises(UserError, match=rf"{key}: expected a finite number, found"):
        load_config("configs/digits.yaml", [f"{key}={value}"])


@pytest.mark.parametrize("eps", ["0", "-1e-8", "1e-60"])
def test_an_epsilon_that_divides_by_zero_is_refused(eps):
    with pytest.raises(UserError, match="eps: must be a positive number of single precision"):
        load_config("configs/digits.yaml", [f"optimizer.eps={eps}"])
