"""What every command does beside its job: options from files, files that redo a run, quiet, completion, interruptions, hints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from nnato.accumulation import FILE
from nnato.cli import COMMANDS, all_commands, common, main, running
from nnato.errors import did_you_mean
from nnato.progress import Estimate, in_time, progress_bar
from nnato.storage import cache_dir, write_artifact

TEXT = ["--context", "32", "--per-document", "0", "--tokens", "100000"]


def run(*arguments, code=0, **settings):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False, **settings)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def accumulated(saved_model, text, tmp_path):
    out = tmp_path / "moments"
    run("accumulate", saved_model, "--pairs", "0:2,1:3", "--text", text, *TEXT, "--out", out)
    return out


def test_nnato_alone_says_what_to_do_first():
    output = run().stdout
    for words in ("nnato demo", "nnato accumulate MODEL", "nnato --help"):
        assert words in output
    assert max(map(len, output.splitlines())) <= 80


def test_unknown_names_are_met_with_the_nearest_one(saved_model):
    assert "no command 'acumulate' (did you mean accumulate?)" in run("acumulate", code=2).output
    assert "Did you mean" in run("fit", "--metrik", "uniform", code=2).output  # click's own, for options
    assert "'identiy' (did you mean identity?)" in run("ablate", "--interventions", "identiy", code=2).output
    assert "'smolm2' (did you mean smollm2?)" in run("info", "smolm2", code=2).output
    assert did_you_mean("zebra", ["mean"]) == ""


def test_a_run_leaves_the_file_that_redoes_it(accumulated, tmp_path):
    config = tomllib.loads((accumulated / "accumulate.toml").read_text())
    assert config["command"] == "accumulate"
    assert config["pairs"] == "0:2,1:3"
    assert config["context"] == 32
    assert config["provenance"]["nnato"]
    (accumulated / FILE).rename(tmp_path / "first")
    for part in accumulated.glob("*.safetensors"):
        part.unlink()
    run("accumulate", "--config", accumulated / "accumulate.toml")
    assert (accumulated / FILE).stat().st_size == (tmp_path / "first").stat().st_size


def test_flags_lists_and_repeated_options_come_back(accumulated, tmp_path):
    run("fit", accumulated, "--standardize", "--select", "kfold", "--out", tmp_path / "o", "--json")
    config = tomllib.loads((tmp_path / "o" / "fit.toml").read_text())
    assert (config["standardize"], config["select"]) == (True, "kfold")
    assert not {"json", "quiet", "config", "compose"} & set(config)
    again = json.loads(run("fit", "--config", tmp_path / "o" / "fit.toml", "--json").stdout)
    assert all(result["standardize"] for result in again["results"])
    operators = [tmp_path / "o" / "0-2.safetensors", tmp_path / "o" / "1-3.safetensors"]
    options = ["--positions", "3", "--sequences", "4", "--interventions", "transport,mean"]
    flags = [part for path in operators for part in ("--operator", path)]
    first = json.loads(run("ablate", *flags, *options, "--out", tmp_path / "a", "--json").stdout)
    second = json.loads(run("ablate", "--config", tmp_path / "a" / "ablate.toml", "--json").stdout)
    assert second["results"] == first["results"]
    assert second["config"] == first["config"]
    assert first["config"]["operator"] == [str(path) for path in operators]


def test_what_is_typed_wins_over_the_file(accumulated, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('pairs = ["0:2", "1:3"]\nmetric = "uniform"\n')
    whole = json.loads(run("fit", accumulated, "--config", path, "--json").stdout)
    assert [(one["source"], one["target"]) for one in whole["results"]] == [(0, 2), (1, 3)]
    assert whole["config"]["metric"] == "uniform"
    typed = json.loads(run("fit", accumulated, "--config", path, "--metric", "whitened", "--pairs", "0:2", "--json").stdout)
    assert typed["config"]["metric"] == "whitened"
    assert len(typed["results"]) == 1


def test_without_out_the_file_lies_in_the_cache(accumulated):
    run("fit", accumulated, "--json")
    assert tomllib.loads((cache_dir() / "runs" / "fit.toml").read_text())["moments"] == str(accumulated)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("pairs = ", "is not a TOML file"),
        ('command = "ablate"', "is of nnato ablate, not of nnato fit"),
        ('metrik = "uniform"', "nnato fit has no option 'metrik' (did you mean metric?)"),
        ('metric = "unifrom"', "'unifrom' is not one of"),
        ("[metric]\nname = 1", "metric is a table"),
        ("json = true", "no option 'json'"),
    ],
)
def test_files_that_do_not_fit_are_refused(content, message, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    assert message in run("fit", "--config", path, code=2).output


def test_strings_survive_toml():
    for value in ('a "quoted" \\ path', "tab\t and \x7f and \x01", "mañana → 0", [1, "x"], 0.1, True):
        assert tomllib.loads(f"value = {running._toml(value)}") == {"value": value}


def test_quiet_leaves_only_results(accumulated, saved_model, text, tmp_path):
    loud = run("accumulate", saved_model, "--pairs", "0:2", "--text", text, *TEXT, "--out", tmp_path / "a")
    assert "GB of sums" in loud.stderr
    calm = run("accumulate", saved_model, "--pairs", "0:2", "--text", text, *TEXT, "--out", tmp_path / "b", "--quiet")
    assert calm.stderr == ""
    assert "1 pair in" in calm.stdout
    assert run("fit", accumulated, "--preset", "paper", "-q").stderr == ""
    assert "Error: " in run("fit", "nothing", "-q", code=2).stderr  # errors are no notes


def test_an_interruption_says_what_was_kept(saved_model, text, tmp_path, monkeypatch):
    from nnato import streaming

    add, calls = streaming._add_batch, []

    def add_some(*arguments):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        add(*arguments)

    monkeypatch.setattr(streaming, "_add_batch", add_some)
    command = ["accumulate", saved_model, "--pairs", "0:2", "--text", text, *TEXT, "--batch-size", "4"]
    out = tmp_path / "m"
    kept = run(*command, "--out", out, "--checkpoint-every", "2", code=130)
    assert f"interrupted: kept {out / FILE} (2 of " in kept.stderr.replace("\n", "")
    assert not (out / "accumulate.toml").exists()
    calls[:] = [1, 1, 1]
    nothing = run(*command, "--out", tmp_path / "n", code=130)
    assert "interrupted: nothing was kept" in nothing.stderr


def test_checkpoints_of_every_kind_are_named_and_others_are_not(tmp_path):
    @common.command("long")
    @click.option("--out", type=click.Path(path_type=Path))
    def long(out):
        for name, metadata in (("sae", {"cursor": 3}), ("sae.previous", {"cursor": 2}), ("operator", {})):
            write_artifact(out / f"{name}.safetensors", "any", {"x": torch.zeros(1)}, metadata)
        (cache_dir() / "models" / "one").mkdir(parents=True)
        write_artifact(cache_dir() / "models" / "one" / "weights.safetensors", "any", {"x": torch.zeros(1)}, {"cursor": 1})
        (out / "foreign.safetensors").write_bytes(b"x")
        raise KeyboardInterrupt

    (tmp_path / "m").mkdir()
    stopped = CliRunner().invoke(long, ["--out", str(tmp_path / "m")])
    assert stopped.exit_code == 130
    assert stopped.stderr == f"interrupted: kept {tmp_path / 'm' / 'sae.safetensors'}; the same command goes on from there\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_every_shell(shell):
    script = run("completion", shell).stdout
    assert "_NNATO_COMPLETE" in script
    assert json.loads(run("completion", shell, "--json").stdout)["results"]["source"] == script.removesuffix("\n")


def test_completion_completes(tmp_path):
    def complete(words):
        environment = {**os.environ, "_NNATO_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
        code = "import sys; sys.argv = ['nnato']; from nnato.cli import main; main(prog_name='nnato')"
        shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        return [line.split(",")[1] for line in shown.stdout.splitlines()]

    assert complete("nnato ab") == ["ablate"]
    assert complete("nnato fit --metric w") == ["whitened"]
    assert "--standardize" in complete("nnato fit --sta")


def test_completion_without_a_known_shell(monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/dash")
    assert "which shell? give one of bash, zsh, fish" in run("completion", code=2).stderr


@pytest.mark.parametrize("command", all_commands())
def test_every_command_has_examples_and_the_common_options(command):
    output = run(*command.split(), "--help").stdout
    for option in ("--config", "--quiet", "--json"):
        assert option in output
    assert re.search(rf"Examples?:\n +nnato {command}", output)
    assert max(map(len, output.splitlines())) <= 80


def test_commands_of_groups_have_files_of_their_own(tmp_path, monkeypatch):
    @click.group("group")
    def group():
        pass

    @common.command("inner")
    @click.option("--number", type=int, default=1)
    @click.option("--out", type=click.Path(path_type=Path))
    def inner(number, out):
        print(number)

    group.add_command(inner)
    module = types.ModuleType("nnato.cli.group")
    module.command = group
    monkeypatch.setitem(sys.modules, "nnato.cli.group", module)
    monkeypatch.setitem(COMMANDS, "group", "A group.")
    assert all_commands()["group inner"] is inner
    run("group", "inner", "--number", "3", "--out", tmp_path)
    assert tomllib.loads((tmp_path / "group-inner.toml").read_text())["command"] == "group inner"
    assert run("group", "inner", "--config", tmp_path / "group-inner.toml").stdout == "3\n"


def test_no_colours_where_none_are_wanted_and_eighty_columns_in_pipes(accumulated):
    code = f"import sys; sys.argv = ['nnato', 'fit', {str(accumulated)!r}]; from nnato.cli import main; main()"
    environment = {**os.environ, "FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm-256color"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert "\x1b[1m" in shown  # bold is no colour
    assert not re.search(r"\x1b\[(?:\d+;)*[34]\d", shown)
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
    piped = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert "\x1b" not in piped
    assert max(len(line) for line in piped.splitlines() if not line.startswith("text:")) <= 80


def test_estimates_come_once_from_the_first_step():
    now = [0.0]
    estimate = Estimate(lambda: now[0])
    assert estimate.line("passes", 20, 100) is None  # resumed at 20
    now[0] = 6.0
    assert estimate.line("passes", 22, 100) == "passes: about 4 min for the 78 left of 100, by the first"
    now[0] = 60.0
    assert estimate.line("passes", 23, 100) is None
    assert estimate.line("short", 0, 10) is None
    now[0] = 61.0
    assert estimate.line("short", 1, 10) is None
    assert estimate.line("endless", 0, None) is None
    assert estimate.line("endless", 5, None) is None


def test_time_in_words():
    assert [in_time(seconds) for seconds in (40, 300, 9000)] == ["40 s", "5 min", "2.5 h"]


def test_bars_are_drawn_in_notebooks_and_not_in_pipes(capsys):
    said = []
    with progress_bar(say=said.append) as progress:
        progress("passes", 0, 2)
        progress("passes", 2, 2)
    assert capsys.readouterr().err == ""
    assert said == []
