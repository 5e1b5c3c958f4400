"""YAML and `key=value` -> one frozen RunConfig, composed of the modules' own configs.

Everything wrong is refused with the file, the key, what was found and what is expected.
"""

import contextlib
import dataclasses
import difflib
import importlib
import math
import os
import pkgutil
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.checkpoint import CheckpointConfig
from pipeline.data.loader import DataConfig
from pipeline.data.mix import MixConfig
from pipeline.engine import EngineConfig
from pipeline.errors import UserError, shorten
from pipeline.health import HealthConfig
from pipeline.optimizer import OptimizerConfig
from pipeline.options import option
from pipeline.parsing import MAX_YAML_BYTES, parse_yaml, read_small
from pipeline.schedule import ScheduleConfig
from pipeline.text import masked_tree
from pipeline.trainer import RunSettings
from vit.model import ViTConfig

ALLOW_PIPE_VARIABLE = "VIT_PRETRAIN_ALLOW_PIPE"
CONFIG_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    train: tuple[Any, ...] = option((), "policies for training, in order", plugins="data.augment")
    val: tuple[Any, ...] = option((), "policies for evaluation, in order", plugins="data.augment")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ViTConfig):
    """A ViT, and the weights it starts from."""

    init_from: str | None = option(None, "weights to start from: a file or folder of any layout; null: random")
    new_head: bool = option(False, "with init_from: start with a fresh head, whatever the file's")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    run: RunSettings
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    mix: MixConfig = MixConfig()
    objective: Any = option("classification", "what is minimised", plugins="objectives")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    health: HealthConfig = HealthConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: tuple[Any, ...] = option(
        ("jsonl", "tensorboard", "progress"), "where metrics go", plugins="monitor", may_change=True
    )

    def __post_init__(self) -> None:
        if self.model.channels != 3:
            raise ValueError(f"model.channels: the shards' images have 3 channels, found {self.model.channels}")


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies `key=value` overrides.

    Raises:
        UserError: anything that the file or an override gets wrong.
    """
    if not os.path.exists(path):
        raise UserError(f"{path}: config not found; the configs here are: {', '.join(list_configs())}")
    try:
        tree = parse_yaml(read_small(path, MAX_YAML_BYTES)) or {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not readable YAML: {' '.join(str(getattr(error, 'strerror', None) or error).split())}"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as `model:`, found {type(tree).__name__}")
    tree = _expand_model(tree, path)
    tree, sources = _apply_overrides(tree, overrides)
    config = _Parser(path, sources).parse(RunConfig, tree, "")
    config = dataclasses.replace(config, data=_allow_pipes(config.data, path, overrides))
    if config.run.dir is None:
        name = os.path.splitext(os.path.basename(path))[0]
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=f"runs/{name}"))
    return config


def load_data_config(path: str | None, overrides: Sequence[str] = ()) -> DataConfig:
    """The section `data` of a config file with `data.key=value` overrides; without a file its defaults.

    Raises:
        UserError: anything that the file or an override gets wrong.
    """
    other = next((text for text in overrides if not text.startswith("data.")), None)
    if other is not None:
        raise UserError(f"command line: {other!r}: only options of data can be set here, such as data.index=FOLDER")
    if path is not None:
        return load_config(path, overrides).data
    tree, sources = _apply_overrides({}, overrides)
    config = _Parser("command line", sources).parse(DataConfig, tree.get("data", {}), "data.")
    return _allow_pipes(config, "command line", overrides)


def _apply_overrides(tree: dict, overrides: Sequence[str]) -> tuple[dict, dict[str, str]]:
    """The tree with the values of `key=value` words in it, and where these keys come from."""
    sources: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"command line: {shorten(override)}: expected key=value, such as optimizer.weight_decay=0.1"
            )
        try:
            value = parse_yaml(text)
        except ValueError:
            value = text
        if isinstance(value, (int, float)) and _is_text(key):
            value = text
        layer: Any = value
        for part in reversed(key.split(".")):
            layer = {part: layer}
        tree = _merge(tree, _expand_model(layer, "command line"))
        sources[key] = "command line"
    return tree, sources


def _is_text(key: str) -> bool:
    """Whether an option's value is text, whatever it looks like."""
    hint: Any = RunConfig
    for part in key.split("."):
        hint = typing.get_type_hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    return hint is str or hint == (str | None)


def _allow_pipes(config: DataConfig, path: str, overrides: Sequence[str]) -> DataConfig:
    """Only the command line or the environment can allow shell commands: the file may be a stranger's.

    Raises:
        UserError: the file alone allows them.
    """
    layer: Any = _apply_overrides({}, overrides)[0]
    for part in ("data", "read", "allow_pipe"):
        layer = layer.get(part) if isinstance(layer, dict) else None
    if layer is not None:
        return config
    allowed = os.environ.get(ALLOW_PIPE_VARIABLE) == "1"
    if config.read.allow_pipe and not allowed:
        raise UserError(
            f"{path}: data.read.allow_pipe: a config file can't allow itself to run shell commands; read the commands"
            " in data.train and data.val, then add data.read.allow_pipe=true to the command line or set the"
            f" environment variable {ALLOW_PIPE_VARIABLE}=1"
        )
    return dataclasses.replace(config, read=dataclasses.replace(config.read, allow_pipe=allowed))


@dataclass(frozen=True)
class Description:
    """All that is taken from a checkpoint's state.json besides its step: nothing that names a source or a command."""

    model: ViTConfig
    preprocessing: tuple[Any, ...]  # policies for evaluation, from `pipeline.data.augment`
    objective: Any
    classes: list[str]
    step: int


def describe_checkpoint(facts: Any, path: str) -> Description:
    """What a checkpoint's `state.json` says of its model.

    Raises:
        UserError: something does not fit; names the checkpoint.
    """
    parser = _Parser(path, {})
    tree = facts.get("config") if isinstance(facts, dict) else None
    if not isinstance(tree, dict) or not isinstance(tree.get("augment", {}), dict):
        raise UserError(f"{path}: state.json describes no model; name another checkpoint")
    classes, step = facts.get("classes") or [], facts.get("step")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path}: state.json: classes: expected a list with the name of each class")
    if type(step) is not int:
        raise UserError(f"{path}: state.json: step: expected a whole number")
    return Description(
        parser.parse(ModelConfig, tree.get("model", {}), "model."),
        parser.plugins("data.augment", tree.get("augment", {}).get("val", ()), "augment.val"),
        parser.plugins("objectives", tree.get("objective", "classification"), "objective"),
        classes,
        step,
    )


def list_configs() -> list[str]:
    return sorted(f"configs/{name}" for name in os.listdir(CONFIG_FOLDER) if name.endswith(".yaml"))


def _expand_model(tree: dict, source: str) -> dict:
    if not isinstance(tree.get("model"), dict):
        return tree
    try:
        return {**tree, "model": ViTConfig.expand(tree["model"])}
    except ValueError as error:
        raise UserError(f"{source}: model.{shorten(str(error), 1000, quote=False)}") from None


def _merge(base: Any, layer: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(layer, dict):
        return layer
    return {**base, **{key: _merge(base.get(key), value) for key, value in layer.items()}}


class _Parser:
    """Walks a tree of plain values beside the dataclasses' types."""

    def __init__(self, path: str, sources: Mapping[str, str]):
        self.path, self.sources = path, sources

    def fail(self, key: str, message: str) -> typing.NoReturn:
        source = next((s for k, s in self.sources.items() if k == key or k.startswith(key + ".")), self.path)
        raise UserError(f"{source}: {shorten(key, quote=False)}: {message}")

    def parse(self, cls: type, tree: Any, prefix: str) -> Any:
        if not isinstance(tree, dict):
            self.fail(prefix.rstrip("."), f"expected a section with keys, found {shorten(tree)}")
        known = {f.name: f for f in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        for key in tree:
            if key not in known:
                key = shorten(key, quote=False)
                near = [name for name in known if key in getattr(hints[name], "__dataclass_fields__", ())]
                near = [f"{name}.{key}" for name in near] or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known here are {', '.join(known)}"
                self.fail(f"{prefix}{key}", f"unknown key; {hint}")
        values = {}
        for name, spec in known.items():
            key, plugins = f"{prefix}{name}", spec.metadata.get("plugins")
            if plugins:
                values[name] = self.plugins(plugins, tree.get(name, spec.default), key)
            elif dataclasses.is_dataclass(hints[name]):
                values[name] = self.parse(typing.cast(type, hints[name]), tree.get(name, {}), f"{key}.")
            elif name in tree:
                values[name] = self.value(hints[name], tree[name], key)
        try:
            return cls(**values)
        except ValueError as error:
            first = str(error).partition(":")[0]
            self.fail(f"{prefix}{first}", shorten(str(error).partition(": ")[2], 1000, quote=False))

    def plugins(self, package: str, given: Any, key: str) -> Any:
        if isinstance(given, (list, tuple)):
            return tuple(self.plugin(package, item, f"{key}[{i}]") for i, item in enumerate(given))
        return self.plugin(package, given, key)

    def plugin(self, package: str, given: Any, key: str) -> Any:
        fields = {"name": given} if isinstance(given, str) else given
        if not isinstance(fields, dict) or "name" not in fields:
            self.fail(
                key, f"expected {{name: ...}}, found {shorten(given)}; known are {', '.join(plugin_names(package))}"
            )
        name = fields["name"]
        if name not in plugin_names(package):
            near = difflib.get_close_matches(shorten(name, quote=False), plugin_names(package), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            self.fail(f"{key}.name", f"unknown {shorten(name)}; {hint}known are {', '.join(plugin_names(package))}")
        options = {k: v for k, v in fields.items() if k != "name"}
        return self.parse(plugin_config(package, name), options, f"{key}.")

    def value(self, hint: Any, given: Any, key: str) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):
            if given is None:
                return None
            return self.value(next(a for a in arguments if a is not type(None)), given, key)
        if origin is typing.Literal:
            given = "no" if given is False and "no" in arguments else given  # YAML reads a bare no as false
            if given not in arguments:
                self.fail(key, f"expected one of {', '.join(map(repr, arguments))}, found {shorten(given)}")
            return given
        if origin is tuple:
            items = given if isinstance(given, list) else [given]
            return tuple(self.value(arguments[0], item, key) for item in items if item is not None)
        if hint is float and isinstance(given, (int, float, str)) and not isinstance(given, bool):
            with contextlib.suppress(ValueError, OverflowError):
                number = float(given)  # PyYAML reads 1e-3 as a string
                if math.isfinite(number):
                    return number
        if hint is int and isinstance(given, (float, str)) and not isinstance(given, bool):
            try:
                if float(given) == int(float(given)):
                    return int(float(given))
            except (ValueError, OverflowError):
                pass
        fits = abs(given) < 1 << 63 if type(given) is int else hint is not float  # finite numbers are done
        if type(given) is hint and fits:
            return given
        names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
        quotes = "; put the text in quotes" if hint is str and isinstance(given, (int, float)) else ""
        self.fail(key, f"expected {names.get(hint, hint)}, found {shorten(given)}{quotes}")


def plugin_names(package: str) -> list[str]:
    """The files of a plugin folder that define a Config: the folder is the registry."""
    module = importlib.import_module(f"pipeline.{package}")
    helpers = {"sink", "meter"}
    return sorted(m.name for m in pkgutil.iter_modules(module.__path__) if m.name not in helpers)


def plugin_config(package: str, name: str) -> type:
    return importlib.import_module(f"pipeline.{package}.{name}").Config


def to_tree(config: Any) -> Any:
    """Plain values that `load_config` reads back to an equal config."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        tree = {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
        if type(config).__name__ == "Config":  # a plugin
            return {"name": type(config).__module__.rsplit(".", 1)[-1], **tree}
        return tree
    if isinstance(config, tuple):
        return [to_tree(item) for item in config]
    return config


def to_yaml(config: RunConfig) -> str:
    """For readers: secrets in URLs are masked."""
    return yaml.safe_dump(masked_tree(to_tree(config)), sort_keys=False, default_flow_style=None, width=100)


def fixed_options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The options that must stay the same when a run is resumed."""
    for spec in dataclasses.fields(config):
        value, key = getattr(config, spec.name), f"{prefix}{spec.name}"
        if spec.metadata.get("may_change"):
            continue
        if dataclasses.is_dataclass(value) and not spec.metadata.get("plugins"):
            yield from fixed_options(value, f"{key}.")
        else:
            yield key, to_tree(value)


def describe_options(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """One line an option, for --help."""
    hints = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        key, hint = f"{prefix}{spec.name}", hints[spec.name]
        plugins = spec.metadata.get("plugins")
        if dataclasses.is_dataclass(hint):
            yield from describe_options(typing.cast(type, hint), f"{key}.")
        elif plugins:
            yield f"  {key}  {spec.metadata['help']}; one of:"
            for name in plugin_names(plugins):
                options = list(describe_options(plugin_config(plugins, name), ""))
                yield f"    {{name: {name}}}"
                yield from (f"    {line}" for line in options)
        else:
            kind = str(getattr(hint, "__name__", hint)) if typing.get_origin(hint) is None else str(hint)
            kind = kind.replace("typing.", "")
            default = yaml.safe_dump(to_tree(spec.default), default_flow_style=True).replace("\n...", "").strip()
            yield f"  {key} = {default}  ({kind})  {spec.metadata.get('help', '')}"
