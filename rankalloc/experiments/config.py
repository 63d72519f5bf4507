"""The configuration of a run: one validated tree, from defaults, then a YAML file, then ``a.b=c`` overrides.

All mistakes are reported at once, one line each, with the dotted path and the value got. Every run saves its
resolved configuration (:meth:`RunConfig.to_yaml`), which reads back as itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator

from ..errors import ConfigError, unknown
from ..recognise import shape_of, what_is
from ..storage.readers import layout_for
from .audit_section import AuditConfig
from .fields import Int, OneOrMapping, Section, wanted
from .file_task import FileTask
from .sections import (
    AdapterConfig,
    BudgetConfig,
    DataConfig,
    ModelConfig,
    TrainingConfig,
    known_method,
)
from .sweep_section import FloatRange, FurtherDimension, SearchConfig, SweepConfig
from .task_names import TASKS


class RunConfig(Section):
    """Everything that configures a run, a sweep or an audit."""

    name: str = "run"
    task: OneOrMapping[str, FileTask] = "punctuation"
    model: OneOrMapping[str | None, ModelConfig] = None
    trust_remote_code: bool = False
    adapter: AdapterConfig = AdapterConfig()
    budget: BudgetConfig = BudgetConfig()
    method: str = "auto"
    method_options: dict[str, Any] = {}
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    sweep: SweepConfig = SweepConfig()
    audit: AuditConfig = AuditConfig()
    tracking: Literal["none", "wandb", "tensorboard", "mlflow"] = "none"
    output: str | None = None
    reader: str | None = None
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0

    @field_validator("name")
    @classmethod
    def _one_folder(cls, value: str) -> str:
        if not re.fullmatch(r"\w([\w .+=@-]{0,98}[\w+=@-])?", value):
            raise ValueError(f"should be one plain folder name (letters, digits, . _ - +), got {value!r}")
        return value

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str | FileTask) -> str | FileTask:
        if isinstance(value, str) and value not in TASKS:
            raise ValueError(unknown("task", value, TASKS) + "; or a mapping with kind and train for your own file")
        return value

    @field_validator("reader")
    @classmethod
    def _reads_folders(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                layout_for(None, reader=value)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return value

    @field_validator("model")
    @classmethod
    def _model_for_files(cls, value: str | ModelConfig | None, info: ValidationInfo) -> str | ModelConfig | None:
        name = value.name if isinstance(value, ModelConfig) else value
        if not name and isinstance(info.data.get("task"), FileTask):
            raise ValueError(f"a task from a file needs one: a local folder or a hub id, got {name!r}")
        return value or None

    @field_validator("budget")
    @classmethod
    def _floor_below_rank(cls, value: BudgetConfig, info: ValidationInfo) -> BudgetConfig:
        rank = info.data["adapter"].rank if "adapter" in info.data else value.min_rank
        if value.min_rank > rank:
            raise ValueError(f"min_rank {value.min_rank} is more than adapter.rank {rank}")
        return value

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        return known_method(value)

    @property
    def model_settings(self) -> ModelConfig:
        """``model`` as a mapping, whichever way it was given."""
        return self.model if isinstance(self.model, ModelConfig) else ModelConfig(name=self.model)

    @property
    def folder(self) -> Path:
        """Where the run writes: ``output``, or ``runs/<name>``."""
        return Path(self.output or Path("runs") / self.name)

    @property
    def searched_methods(self) -> list[str]:
        """The methods a sweep chooses from, without repeats."""
        given = self.sweep.search.method
        names = [self.method, "uniform"] if given is None else [given] if isinstance(given, str) else given
        return list(dict.fromkeys(names))

    def replaced(self, values: Mapping[str, Any]) -> RunConfig:
        """A validated copy with the values at these dotted paths; ConfigError as :func:`load_config`."""
        tree = self.model_dump()
        for path, value in values.items():
            _put(tree, path.split("."), value)
        return _validated(tree, [])

    def to_yaml(self) -> str:
        """The resolved configuration as YAML; :func:`load_config` reads it back as an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration: defaults, then the YAML file, then ``a.b=c`` overrides (``c`` is YAML).

    Relative paths (data files, adapters to keep away from, a model's folder) are relative to the YAML file's
    folder if they are in the file, and to the current folder if they are in an override.

    Raises:
        ConfigError: every mistake, one line each, or why the file cannot be read.
    """
    tree = {} if path is None else _read_yaml(Path(path))
    _absolute(tree, Path(path).parent if path is not None else Path())
    mistakes: list[str] = []
    given: dict[tuple[str, ...], Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = tuple(part.strip() for part in key.split("."))
        if not equals or not all(parts):
            mistakes.append(f"{override!r} is not an override: write it as key=value, such as training.steps=100")
            continue
        try:
            given[parts] = safe_yaml(text)
        except (yaml.YAMLError, RecursionError, ValueError):
            mistakes.append(f"{'.'.join(parts)}: {text!r} is not a valid YAML value; quote it if it is text")
    # An override's paths are resolved in a separate tree: the file's are already absolute.
    for parts, value in given.items():
        own: dict[str, Any] = {}
        _put(own, parts, value)
        _absolute(own, Path())
        for part in parts:
            own = own[part]
        _put(tree, parts, own)
    return _validated(tree, mistakes)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = safe_yaml(text)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}") from None
    except IsADirectoryError:
        inside = path / "config.yaml"
        way_out = f"give {inside}, which it holds" if inside.is_file() else "give a YAML file"
        raise ConfigError(f"the configuration {path} is a folder; {way_out}") from None
    except OSError as error:
        raise ConfigError(f"could not read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the configuration {path} is not UTF-8 text") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        deep = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or deep
        raise ConfigError(f"the configuration {path} is not valid YAML{where}: {why}") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"the configuration {path} should hold keys and values, and holds {shape_of(tree)}")
    if what := what_is(tree):
        beside = path.parent / "config.yaml"
        way_out = f"; the one that belongs to it is {beside}" if beside.is_file() else ""
        raise ConfigError(f"{path} is {what} and not a configuration{way_out}")
    if not text.strip():
        raise ConfigError(f"the configuration {path} is empty; leave it out to train with defaults alone")
    return tree or {}


MOST_VALUES = 100_000
"""Values in a configuration, each alias (``*name``) with all that it stands for: nine lines of aliases can stand for
more than a memory holds."""


def safe_yaml(text: str) -> Any:
    """YAML as plain values.

    Raises:
        yaml.YAMLError: it is not YAML, stands for too many values, or holds itself.
        ValueError, RecursionError: a number has thousands of digits, or it is nested too deep.
    """
    tree = yaml.safe_load(text)
    if _values_in(tree, {}) > MOST_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
    return tree


def _values_in(tree: Any, known: dict[int, int]) -> int:
    """How many values a tree has when aliases are written out; ``known`` holds those of the parts that were seen."""
    if not isinstance(tree, (dict, list)):
        return 1
    if id(tree) not in known:
        known[id(tree)] = MOST_VALUES + 1  # what it counts for inside itself
        parts = tree.values() if isinstance(tree, dict) else tree
        known[id(tree)] = min(1 + sum(_values_in(part, known) for part in parts), MOST_VALUES + 1)
    return known[id(tree)]


def _absolute(tree: dict[str, Any], folder: Path) -> None:
    task, model, training = tree.get("task"), tree.get("model"), tree.get("training")
    if isinstance(task, dict):
        for split in ("train", "tune", "report"):
            if isinstance(task.get(split), str):
                task[split] = _data_at(task[split], folder)
    if isinstance(training, dict):
        away = training.get("away_from")
        if isinstance(away, str):
            training["away_from"] = str((folder / away).absolute())
        elif isinstance(away, list):
            training["away_from"] = [str((folder / one).absolute()) if isinstance(one, str) else one for one in away]
    sweep = tree.get("sweep")
    if isinstance(sweep, dict) and isinstance(sweep.get("start_from"), (str, list)):
        given = sweep["start_from"]
        sweep["start_from"] = [
            str((folder / one).absolute()) if isinstance(one, str) else one
            for one in ([given] if isinstance(given, str) else given)
        ]
    if isinstance(model, dict):
        template = model.get("chat_template")
        if isinstance(template, str) and template.strip() and "{" not in template:
            model["chat_template"] = str((folder / template).absolute())
        if isinstance(model.get("name"), str):
            model["name"] = _model_at(model["name"], folder)
    elif isinstance(model, str):
        tree["model"] = _model_at(model, folder)


def _data_at(source: str, folder: Path) -> str:
    """A set on the hub looks like a relative path; it is one if nothing is there, and it is no file's name."""
    bare = source.partition("[")[0]
    if re.fullmatch(r"[\w-]+/[\w.-]+(:[\w.-]+)?", bare) and Path(bare).suffix.lower() not in _DATA_FILES:
        owner, _, _ = bare.partition("/")
        if not (folder / owner).exists():
            return source
    return str((folder / source).absolute())


_DATA_FILES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt", ".parquet", ".arrow")


def _model_at(model: str, folder: Path) -> str:
    """A hub id looks like a relative path; it is a folder if it begins like one or if the folder exists."""
    local = model and (model.startswith(("./", "../")) or (folder / model).is_dir())
    return str((folder / model).absolute()) if local else model


def _put(tree: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    for depth, part in enumerate(parts[:-1], start=1):
        if not isinstance(tree.get(part), dict):
            if depth == 1 and part == "model" and isinstance(tree.get(part), str):
                tree[part] = {"name": tree[part]}  # which says the same
                tree = tree[part]
                continue
            # An override of one part of a range keeps the default's other parts.
            in_search = list(parts[: depth - 1]) == ["sweep", "search"] and part not in tree
            default = SearchConfig().model_dump().get(part) if in_search else None
            tree[part] = default if isinstance(default, dict) else {}
        tree = tree[part]
    tree[parts[-1]] = value


def _validated(tree: dict[str, Any], mistakes: list[str]) -> RunConfig:
    sections = {name for name, field in RunConfig.model_fields.items() if isinstance(field.default, BaseModel)}
    try:
        # A section whose keys are all commented out reads as null, and is an empty section.
        config = RunConfig.model_validate({k: v for k, v in tree.items() if v is not None or k not in sections})
    except ValidationError as error:
        mistakes = mistakes + [_sentence(dict(mistake)) for mistake in error.errors()]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return config


def _sentence(mistake: dict[str, Any]) -> str:
    keys = [str(part) for part in mistake["loc"] if not str(part).startswith("<")]
    kind, message, got = mistake["type"], mistake["msg"], mistake["input"]
    if kind == "extra_forbidden":
        message = unknown("key", keys[-1], _keys_at(mistake["loc"][:-1]))
    elif kind == "literal_error":
        message = unknown("choice", got, re.findall(r"'([^']*)'", mistake["ctx"]["expected"]))
        return f"{'.'.join(keys)}: {message}"
    elif kind == "missing":
        return f"{'.'.join(keys)}: is required"
    elif kind == "value_error":
        return f"{'.'.join(keys)}: {message.removeprefix('Value error, ')}"
    elif kind in ("model_type", "dict_type"):
        message = "should be a mapping of keys to values"
    elif kind == "union_tag_invalid":
        shapes = {"<one>": "a single value", "<list>": "a list", "<mapping>": "a mapping"}
        message = "should be " + " or ".join(shapes[tag] for tag in shapes if tag in mistake["ctx"]["expected_tags"])
    value = repr(got)
    message = wanted(kind, mistake.get("ctx", {})) or message.removeprefix("Input ")
    return f"{'.'.join(keys)}: {message}, got {value if len(value) < 80 else value[:76] + ' ...'}"


def _keys_at(location: Sequence[Any]) -> list[str]:
    section: Any = RunConfig
    for part in location:
        field = section.model_fields.get(part)
        if part == "<mapping>":
            further = FurtherDimension if "more" in location else FloatRange
            section = {"task": FileTask, "model": ModelConfig}.get(location[0], further)
        elif field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            section = field.annotation
    return list(section.model_fields)
