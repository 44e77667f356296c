"""Dataclass → flags, YAML → defaults, in-code EXPERIMENT → defaults; one error box, exit statuses.

Precedence, lowest first: dataclass defaults, the script's EXPERIMENT, `--config` files in order,
`--set`, flags. Every script accepts besides its own flags:

    --config FILE.yaml   settings as YAML (several allowed, the later wins)
    --set key=value      one setting by its name in the dataclass, e.g. `--set params.rank=8`
    --print-config       print the resolved settings as YAML and end
    --sweep              run the script's list of experiments (where it has one)

A flag of a block, `--data.devset`, may be given by its last name where no other flag has it.

Exit status: 0 done, 2 something the user can mend, 3 a gate was not met, 130/143 interrupted.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
import yaml

from workbench.errors import USER_ERRORS, ConfigError, GateFailed, Interrupted, shorten
from workbench.run import RunOptions, to_plain

__all__ = ["RunField", "RunOptions", "cli", "grid", "list_scripts"]

RunField = Annotated[RunOptions, tyro.conf.arg(name="")]
MAX_YAML_BYTES, MAX_YAML_DEPTH, MAX_YAML_NODES = 2**20, 20, 10_000


def grid(experiment: Any, **choices: Sequence[Any]) -> list[Any]:
    """Every combination of the given field values, as experiments (first field slowest)."""
    from workbench.sweep import grid as build

    return build(experiment, **choices)


# ---------------------------------------------------------------- YAML


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases, duplicate keys, bottomless nesting or huge documents."""

    nodes = 0
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError("aliases (*name) are not allowed in settings")
        self.nodes += 1
        self.depth += 1
        if self.nodes > MAX_YAML_NODES or self.depth > MAX_YAML_DEPTH:
            raise ConfigError(
                f"more than {MAX_YAML_NODES} values or {MAX_YAML_DEPTH} levels: no settings file"
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is no name")
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} occurs twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """A settings file as a dict.

    Raises:
        ConfigError: missing, too large, not UTF-8, not YAML, a key twice, aliases, no mapping.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        )
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ConfigError(f"--config {path}: no such file{hint}")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(f"--config {path}: larger than {MAX_YAML_BYTES} bytes: no settings file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = yaml.load(text, Loader=_StrictLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f" line {place.line + 1}" if place else ""
        raise ConfigError(
            f"--config {path}:{line} not valid YAML ({getattr(error, 'problem', error)})"
        ) from None
    except RecursionError:
        raise ConfigError(f"--config {path}: nested too deeply") from None
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"--config {path}: expected `name: value` lines, found {value!r:.80}")
    return value


def apply_settings(default: Any, values: dict[str, Any], where: str) -> Any:
    """`default` with the fields that `values` names replaced, each checked against its type.

    Keys of the `run` block may be given with or without the block's name.

    Raises:
        ConfigError: unknown key (with the nearest ones) or a value of the wrong type.
    """
    hints = typing.get_type_hints(type(default), include_extras=False)
    names = {f.name for f in dataclasses.fields(default)}
    run_names = {f.name for f in dataclasses.fields(RunOptions)} if "run" in names else set()
    changes: dict[str, Any] = {}
    run_values: dict[str, Any] = {}
    for raw, value in values.items():
        key = raw.replace("-", "_")
        if key == "run" and isinstance(value, dict) and "run" in names:
            run_values |= value
        elif key in names:
            changes[key] = _convert(hints[key], value, getattr(default, key), f"{where}: {raw}")
        elif key in run_names:
            run_values[key] = value
        else:
            near = difflib.get_close_matches(key, sorted(names | run_names), n=3, cutoff=0.5)
            hint = f"; perhaps you meant {', '.join(near)}" if near else ""
            known = ", ".join(sorted(names - {"run"}))
            raise ConfigError(shorten(f"{where}: unknown key {raw!r}{hint}; known: {known}"))
    if run_values:
        changes["run"] = apply_settings(default.run, run_values, f"{where}: run")
    return dataclasses.replace(default, **changes)


def apply_assignments(default: Any, assignments: Sequence[str]) -> Any:
    """`default` with the fields that `key=value` words name replaced; `block.key=value` goes into a
    block, and entries of a tuple are parted by commas or blanks.

    Raises:
        ConfigError: no `=`, unknown key (with the nearest ones) or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for word in assignments:
        key, equals, text = word.partition("=")
        *blocks, name = key.strip().replace("-", "_").split(".")
        if not equals or not name or not all(blocks):
            raise ConfigError(shorten(f"--set {word}: expected key=value"))
        inside, owner = values, default
        for block in blocks:
            inside, owner = inside.setdefault(block, {}), getattr(owner, block, None)
            if not isinstance(inside, dict):
                raise ConfigError(shorten(f"--set {word}: {block} is given twice"))
        inside[name] = _from_text(owner, name, text.strip())
    return apply_settings(default, values, "--set") if values else default


def _from_text(owner: Any, name: str, text: str) -> Any:
    """What a settings file would hold for the field `name`: the first reading that fits its
    type."""
    if not dataclasses.is_dataclass(owner):
        return text
    hints = typing.get_type_hints(type(owner))
    if name not in hints and "run" in hints:
        owner, hints = RunOptions, typing.get_type_hints(RunOptions)
    if name not in hints:
        return text
    parts = [part.strip() for part in text.split("," if "," in text else None)]
    readings = [_scalar(text), text, [_scalar(part) for part in parts], parts]
    for reading in readings:
        with contextlib.suppress(ConfigError):
            _convert(hints[name], reading, getattr(owner, name, None), "--set")
            return reading
    return readings[0]


def in_full(settings: type, words: Sequence[str]) -> list[str]:
    """The words with `--lr` written as `--optim.lr` where one block alone has a field `lr` and the
    settings themselves have none."""
    flags: dict[str, list[str]] = {}
    for path in _flags(settings):
        flags.setdefault(path[-1], []).append(".".join(path))
    found = []
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        negated = name.startswith("no_") and name not in flags
        paths = flags.get(name.removeprefix("no_") if negated else name, [])
        if word.startswith("--") and len(paths) == 1 and "." in paths[0]:
            block, _, leaf = paths[0].rpartition(".")
            word = f"--{block}.{'no_' if negated else ''}{leaf}{equals}{value}"
        found.append(word)
    return found


def _flags(settings: type, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every flag; fields of a block that has no name of its own stand beside it."""
    hints = typing.get_type_hints(settings, include_extras=True)
    for field in dataclasses.fields(settings):
        hint, own = hints[field.name], (*prefix, field.name)
        if typing.get_origin(hint) is Annotated:
            hint, *notes = typing.get_args(hint)
            if any(getattr(note, "name", None) == "" for note in notes):
                own = prefix
        if dataclasses.is_dataclass(hint):
            yield from _flags(typing.cast(type, hint), own)
        else:
            yield own


def _scalar(text: str) -> Any:
    """A number, a truth value, None or the text itself."""
    if text in ("None", "none"):
        return None
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ConfigError, RecursionError):
        return text
    return value if isinstance(value, (bool, int, float, type(None))) else text


def _convert(hint: Any, value: Any, current: Any, where: str) -> Any:
    """One YAML value as the annotated type (`1e-3` is text to YAML and a float to us)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _convert(arguments[0], value, current, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        errors = []
        for option in (a for a in arguments if a is not type(None)):
            try:
                return _convert(option, value, current, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        raise ConfigError(
            f"{where}: found {value!r}, expected one of {', '.join(map(str, arguments))}"
        )
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: found {value!r}, expected a list")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(arguments) != len(value):
            raise ConfigError(f"{where}: {len(value)} values, expected {len(arguments)}")
        return tuple(
            _convert(a, v, None, f"{where}[{i}]")
            for i, (a, v) in enumerate(zip(arguments, value, strict=True))
        )
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: found {value!r}, expected `name: value` lines")
        base = current if dataclasses.is_dataclass(current) else hint()
        return apply_settings(base, value, where)
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    expected = getattr(hint, "__name__", str(hint))
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    raise ConfigError(f"{where}: found {value!r}, expected {expected}")


# ---------------------------------------------------------------- the front door


def cli(
    main: Callable[[Any], Any],
    experiment: Any,
    *,
    sweep: Sequence[Any] | None = None,
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the command line over `experiment`, call `main`, print its figures, exit.

    `sweep` is the list of experiments behind `--sweep`.
    """
    _prepare_process()
    with contextlib.suppress(ValueError):  # outside of the main thread signals are not ours
        signal.signal(signal.SIGTERM, _terminated)
    status = _guard(lambda: _run(main, experiment, sweep, arguments), arguments)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.exit(status)


def _terminated(number: int, frame: Any) -> NoReturn:
    """SIGTERM while no run is open (a `Run` handles signals itself)."""
    raise Interrupted(number, "stopped while no run was open; run the same command to continue")


def _prepare_process() -> None:
    """Settings of this process only (never done at import): quiet libraries, safe encodings."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("USE_HUB_KERNELS", "0")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def parse(
    experiment: Any, arguments: Sequence[str], program: str | None = None, text: str = ""
) -> tuple[Any, argparse.Namespace]:
    """The experiment after `--config`, `--set` and flags, and the options of the front door."""
    front = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    front.add_argument("--config", action="append", default=[])
    front.add_argument("--set", action="append", default=[])
    front.add_argument("--print-config", action="store_true")
    front.add_argument("--sweep", action="store_true")
    try:
        options, rest = front.parse_known_args(list(arguments))
    except SystemExit:
        raise ConfigError("--config needs a file name, --set a key=value") from None
    for file in options.config:
        experiment = apply_settings(experiment, read_yaml(file), f"--config {file}")
    experiment = apply_assignments(experiment, options.set)
    parsed = tyro.cli(
        type(experiment),
        args=in_full(type(experiment), rest),
        default=experiment,
        prog=program,
        description=text or None,
    )
    return parsed, options


def _run(
    main: Callable[[Any], Any],
    experiment: Any,
    sweep: Sequence[Any] | None,
    arguments: Sequence[str] | None,
) -> int:
    module = sys.modules.get(main.__module__)
    spec = getattr(module, "__spec__", None)
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
    text = (getattr(module, "__doc__", "") or "").strip()
    text += (
        "\n\nAlso: --config FILE.yaml (several allowed, the later wins), --set key=value (several "
        "allowed), --print-config" + (", --sweep." if sweep else ".")
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed, options = parse(experiment, words, program, text)
    if options.print_config:
        _say(yaml.safe_dump(to_plain(parsed), sort_keys=False, allow_unicode=True).rstrip())
        return 0
    if options.sweep:
        if not sweep:
            raise ConfigError("--sweep: this script has no list of experiments; see EXPERIMENTS")
        from workbench.sweep import run_all

        results = run_all(main, [dataclasses.replace(e, run=parsed.run) for e in sweep])
        for one in results:
            _show(one)
        return 0
    _show(main(parsed))
    return 0


def _guard(action: Callable[[], int], arguments: Sequence[str] | None) -> int:
    """Run `action`; turn what a user can mend into one message and an exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_trace = "--traceback" in words
    try:
        return action()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else (0 if error.code is None else 2)
    except Interrupted as error:
        _complain(str(error), title="interrupted")
        return 128 + error.signal_number
    except KeyboardInterrupt:
        _complain("stopped while no run was open; run the same command to continue", "interrupted")
        return 128 + signal.SIGINT
    except GateFailed as error:
        _complain(str(error), title="gate not met")
        return 3
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except USER_ERRORS as error:
        if show_trace:
            raise
        _complain(str(error))
        return 2
    except MemoryError:
        if show_trace:
            raise
        _complain("out of memory; lower the batch size, the width or the number of examples")
        return 2
    except OSError as error:
        if show_trace or error.filename is None:
            raise
        _complain(f"{error.filename}: {error.strerror or error}")
        return 2


def _complain(message: str, title: str = "error") -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{title}: {shorten(message)}\n")
        sys.stderr.flush()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _show(results: Any) -> None:
    """The scalar figures of a finished script as a small table on standard output."""
    if not isinstance(results, dict):
        return
    rows = [(key, value) for key, value in results.items() if _is_scalar(value)]
    width = max((len(str(key)) for key, _ in rows), default=0)
    for key, value in rows:
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        _say(f"{key!s:<{width}}  {shown}")


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool))


def list_scripts(package: str) -> None:
    """Print one line per script of a package: how to run it and what it does."""
    import importlib.util

    spec = importlib.util.find_spec(package)
    folder = Path(next(iter(spec.submodule_search_locations or ()))) if spec else Path()
    lines = []
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if "main" in names and path.name != "__main__.py":
            sentence = (ast.get_docstring(tree) or "").splitlines()[:1]
            lines.append((f"python -m {package}.{path.stem}", " ".join(sentence)))
    width = max((len(command) for command, _ in lines), default=0)
    for command, sentence in lines:
        _say(f"{command:<{width}}  {sentence}")
