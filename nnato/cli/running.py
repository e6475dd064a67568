"""What every command does beside its job: options from a file, the file that redoes it, what an interruption leaves."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from nnato.errors import NnatoError, did_you_mean

LONGEST = 200
"""Characters of a first sentence in the help of a group, at most."""
QUIET = "nnato.quiet"
BEGAN = "nnato.began"
ASIDE = ("json", "config", "quiet", "help")
"""Options that say how a run is shown, not what it is: no file keeps them."""


def _config_option() -> click.Option:
    return click.Option(
        ["--config"],
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        is_eager=True,
        expose_value=False,
        callback=_take_config,
        help="Take options from a TOML file, such as a run leaves behind; what is typed here wins.",
    )


def _quiet_option() -> click.Option:
    return click.Option(
        ["-q", "--quiet"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_be_quiet,
        help="No progress and no notes, only results.",
    )


class Command(click.Command):
    """A click command with `--config` and `--quiet`."""

    def __init__(self, name: str | None, *, params: list[click.Parameter] | None = None, **settings: Any) -> None:
        super().__init__(name, params=[*(params or ()), _config_option(), _quiet_option()], **settings)


class Group(click.Group):
    """A click group whose help lists commands as they were added, each with its whole first sentence: click cuts that to one line."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names, in the order in which one uses them."""
        return list(self.commands)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in --help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit=LONGEST)) for name, command in self.commands.items()])


def quiet() -> bool:
    """Whether the running command was told to be."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(QUIET))


def _be_quiet(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.meta[QUIET] = value
    context.meta[BEGAN] = time.time()


def _name(context: click.Context) -> str:
    """A command as it is typed, without `nnato`: `fit`, or a group and its command."""
    names: list[str] = []
    while context.parent is not None:
        names.insert(0, str(context.info_name))
        context = context.parent
    return " ".join(names)


def _key(parameter: click.Parameter) -> str:
    """How a file names an option or argument: as it is typed, without dashes in front."""
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len).lstrip("-")
    return str(parameter.name)


def _parameters(command: click.Command) -> dict[str, click.Parameter]:
    return {key: parameter for parameter in command.params if (key := _key(parameter)) not in ASIDE}


def _take_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Make a file's values the defaults of a command."""
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path} is not a TOML file: {error}") from None
    values.pop("provenance", None)
    own = _name(context)
    if (named := values.pop("command", own)) != own:
        raise click.UsageError(f"{path} is of nnato {named}, not of nnato {own}")
    known = _parameters(context.command)
    defaults = {}
    for key, value in values.items():
        if key not in known:
            raise click.UsageError(f"{path}: nnato {own} has no option {key!r}{did_you_mean(key, known)}")
        if isinstance(value, dict):
            raise click.UsageError(f"{path}: {key} is a table, and an option takes one value")
        if isinstance(value, list) and not known[key].multiple:
            value = ",".join(map(str, value))
        defaults[str(known[key].name)] = value
    context.default_map = {**(context.default_map or {}), **defaults}


def chosen_options() -> dict[str, Any]:
    """The running command's options and arguments that have a value, as a file names them."""
    context = click.get_current_context(silent=True)
    if context is None:
        return {}
    values = {key: context.params.get(str(parameter.name)) for key, parameter in _parameters(context.command).items()}
    return {key: _plain(value) for key, value in values.items() if value is not None and value != () and value is not False}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def write_config() -> Path:
    """Write the file that redoes the running command: into its `--out` folder, else into the user's cache.

    Raises:
        OutputError: It cannot be written.
    """
    from nnato.storage import atomic, prepare_cache, provenance

    context = click.get_current_context()
    name, out = _name(context), context.params.get("out")
    folder = Path(out).expanduser() if out is not None else prepare_cache("runs")
    path = (folder if folder.is_dir() else folder.parent) / f"{name.replace(' ', '-')}.toml"
    lines = [f"# nnato {name} --config {path.name}", f"command = {_toml(name)}"]
    lines += [f"{key} = {_toml(value)}" for key, value in chosen_options().items()]
    lines += ["", "[provenance]", *(f"{key} = {_toml(value)}" for key, value in provenance().items())]
    with atomic(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return path


def _toml(value: Any) -> str:
    """A value in TOML, whose strings are JSON's but for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def interrupted() -> str:
    """What an interrupted command has kept: checkpoints written since it began, in its `--out` folder or the user's cache."""
    kept = list(_checkpoints())
    if not kept:
        return "interrupted: nothing was kept, since nothing was checkpointed yet; the same command begins again"
    return f"interrupted: kept {', '.join(kept)}; the same command goes on from there"


def _checkpoints() -> Iterator[str]:
    from nnato.storage import cache_dir, read_metadata

    context = click.get_current_context()
    out, began = context.params.get("out"), context.meta[BEGAN]
    cached = [] if not cache_dir().is_dir() else [place for place in sorted(cache_dir().iterdir()) if place.name != "models"]
    for place in cached if out is None else [Path(out).expanduser(), *cached]:
        for path in sorted(place.rglob("*.safetensors")):
            if path.stat().st_mtime < began - 1 or path.stem.endswith(".previous"):
                continue
            try:
                about: Mapping[str, Any] = read_metadata(path)
            except NnatoError:
                continue  # not a file of ours
            if "cursor" in about:
                yield f"{path} ({about['cursor']} of {about['batches']} forward passes)" if "batches" in about else str(path)
