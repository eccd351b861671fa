"""A command's flags in a YAML or TOML file: read as a command line would be, and written for a run to be started again.

A key is a flag's name, a value what stands behind the flag: a number, a text, true or false, a list, or null for
None. Relative paths are relative to the working directory, as on the command line, and `~` and variables of the
environment stand for what they do in a shell. Numbers and dates are what is written, so a run may be named 007.
"""

import dataclasses
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gptbert.errors import InputError, first_line
from gptbert.io.files import replacing

FLAG = "run_file"
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class RunFile:
    """A file of flags.

    Attributes:
        path: the file.
        text: its content.
        arguments: the command line that says the same.
    """

    path: Path
    text: str
    arguments: list[str]

    def line_of(self, key: str) -> int:
        """The line that a key is on."""
        found = re.search(rf"""^[ \t]*["']?{re.escape(key)}["']?[ \t]*[:=]""", self.text, re.MULTILINE)
        return self.text.count("\n", 0, found.start()) + 1 if found else 1

    def origin(self, message: str, others: Sequence[str]) -> str:
        """Where a flag that a message names has its value from, as the message's end; "" if not from this file.

        Args:
            message: on a flag that cannot be used.
            others: the command line's own arguments, which count more.
        """
        own = set(_names(others))
        for name in re.findall(r"--([a-z_0-9]+)", message):
            if name not in own and f"--{name}" in {argument.partition("=")[0] for argument in self.arguments}:
                return f" (from {self.path}:{self.line_of(name)})"
        return ""


def named_file(settings: type, arguments: Sequence[str]) -> RunFile | None:
    """The file that a command line names with `--run_file`; None without the flag, or if the command has none.

    Raises:
        InputError: the file cannot be read, or has a key or value that is no flag's.
    """
    if FLAG not in {field.name for field in dataclasses.fields(settings)}:
        return None
    values = [value for name, value in _pairs(arguments) if name == FLAG]
    if not values:
        return None
    if len(values) > 1:
        raise InputError(f"--{FLAG} is there {len(values)} times; name one file")
    path = Path(values[0])
    text = _text(path)
    file = RunFile(path, text, [])
    kinds = {field.name: field.type for field in dataclasses.fields(settings) if field.name != FLAG}
    for key, value in _settings(path, text).items():
        where = f"{path}:{file.line_of(str(key))}"
        if key not in kinds:
            meant = get_close_matches(str(key), kinds, n=1)
            raise InputError(f"{where}: there is no flag --{key}" + (f"; did you mean {meant[0]}?" if meant else ""))
        file.arguments.extend(_as_arguments(where, key, value, is_switch=kinds[key] is bool))
    return file


def write_run_file(path: Path, settings: Any) -> None:
    """Write all flags of a command as YAML, for `--run_file`.

    Args:
        path: the file.
        settings: an instance of the command's dataclass, with a method `to_dict`.
    """
    yaml = importlib.import_module("yaml")
    values = {name: value for name, value in settings.to_dict().items() if name != FLAG}
    head = f"# All settings of this run: gptbert train --{FLAG} {path.name} --name ANOTHER starts it again.\n"
    with replacing(path) as file:
        file.write_text(head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def with_home(argument: str) -> str:
    """`--flag=~/x` with the home folder in place of `~`, which shells leave as it is behind an equals sign."""
    flag, equals, value = argument.partition("=")
    return f"{flag}{equals}{_with_home(flag, value)}" if flag.startswith("--") else argument


def repeated(arguments: Sequence[str]) -> list[str]:
    """The flags that a command line has more than once, of which the last one counts."""
    names = _names(arguments)
    return [f"--{name}" for name in dict.fromkeys(names) if names.count(name) > 1]


def switch_with_value(settings: type, arguments: Sequence[str]) -> str:
    """A line on a switch with a truth value behind it, as other programs have them; empty if there is none."""
    switches = {field.name for field in dataclasses.fields(settings) if field.type is bool}
    for flag, value in _pairs(arguments):
        name = flag.removeprefix("no_")
        if name in switches and value.lower() in {"true", "false", "yes", "no", "on", "off", "0", "1"}:
            return f"--{name} {value}: is a switch without a value; --{name} is on, --no_{name} is off"
    return ""


def _as_arguments(where: str, key: str, value: Any, *, is_switch: bool) -> list[str]:
    if is_switch or isinstance(value, bool):
        if not (is_switch and isinstance(value, bool)):
            wanted = "true or false" if is_switch else "no truth value; a text such as on, yes or no needs quotes"
            raise InputError(f"{where}: {key} is {value}, expected {wanted}")
        return [f"--{key}" if value else f"--no_{key}"]
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, dict | list) for each in value)):
        raise InputError(f"{where}: {key} has values inside of values, expected one value or a list")
    if isinstance(value, list):
        return [f"--{key}", *(_as_in_shells(where, key, str(each)) for each in value)]
    return [f"--{key}={_as_in_shells(where, key, str(value))}"]


def _with_home(where: str, text: str) -> str:
    if text.partition("/")[0] != "~":
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        raise InputError(f"{where} {text}: HOME is not set, and the user has no folder; write the path") from error


def _as_in_shells(where: str, key: str, text: str) -> str:
    text = os.path.expandvars(_with_home(f"{where}: {key}", text))
    if absent := re.search(r"\$(\w+|\{\w+\})", text):
        raise InputError(
            f"{where}: {key} has {absent[0]}, which the environment has not; set it, or write what it means"
        )
    return text


def _settings(path: Path, text: str) -> dict[Any, Any]:
    form, read = ("TOML", _toml) if path.suffix == ".toml" else ("YAML", _yaml)
    try:
        content = read(path, text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not {form} ({first_line(error)})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected flags and their values, such as max_steps: 1000, a line each")
    return content


def _toml(_path: Path, text: str) -> Any:
    tomllib = importlib.import_module("tomllib")  # here, since it takes every command's start longer
    return tomllib.loads(text, parse_float=str)


def _yaml(path: Path, text: str) -> Any:
    """The content, without two of YAML's rules: that of equal keys the last one counts, and that 007 means 7."""
    yaml = importlib.import_module("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, pattern) for tag, pattern in rules if tag.rpartition(":")[2] in {"bool", "null", "merge"}]
            for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    try:
        node = yaml.compose(text, Loader)
        content = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: not YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from None
    keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    for number, key in enumerate(keys):
        if any(key.value == before.value for before in keys[:number]):
            raise InputError(f"{path}:{key.start_mark.line + 1}: {key.value} is there twice; name it once")
    return content


def _text(path: Path) -> str:
    if path.suffix not in {".yaml", ".yml", ".toml", ".json"}:
        raise InputError(f"--{FLAG} {path}: expected a file of YAML or TOML whose name ends in .yaml, .yml or .toml")
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"--{FLAG} {path}: cannot be read ({error.strerror})") from None
    if len(content) > _MOST_BYTES:
        raise InputError(f"--{FLAG} {path}: has more than {_MOST_BYTES:,} bytes, so it is no file of flags")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names of the flags, and what follows each."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument.startswith("--"):
            name, has_value, value = argument[2:].partition("=")
            yield name.replace("-", "_"), value if has_value else following


def _names(arguments: Sequence[str]) -> list[str]:
    return [name.removeprefix("no_") for name, _ in _pairs(arguments)]
