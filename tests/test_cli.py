"""Commands as a user types them: results, JSON contract, errors and exit codes."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from nnato import fitting
from nnato.accumulation import FILE, load_moments
from nnato.cli import COMMANDS, main, tables
from nnato.edits import INTERVENTIONS
from nnato.errors import OutputError
from nnato.metrics import METRICS
from nnato.sites import ResidualSite
from nnato.storage import exclusive

TEXT = ["--context", "32", "--per-document", "0", "--tokens", "100000"]


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def check_envelope(result, model=True):
    record = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert record["schema"] == 1
    assert record["nnato"]
    assert "seed" in record
    assert "command" in record
    if model:
        assert record["model"]["d_model"] == 16
        assert record["text"]["context"] == 32
    return record["results"]


@pytest.fixture
def moments(saved_model, text, tmp_path):
    out = tmp_path / "moments"
    run("accumulate", saved_model, "--pairs", "0:2,1:3,embed:2", "--text", text, *TEXT, "--out", out)
    return out


def test_accumulate(saved_model, text, tmp_path):
    result = run("accumulate", saved_model, "--sites", "0,2,embed", "--text", text, *TEXT, "--out", tmp_path / "m", "--json")
    results = check_envelope(result)
    assert results["sites"] == ["embed", 0, 2]
    assert results["pairs"] == [["embed", 0], ["embed", 2], [0, 2]]
    assert set(results["tokens"]) == {"train", "validation", "test"}
    assert results["excluded_tokens"] == sum(results["excluded"].values())
    assert results["bytes"] == sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors"))
    again = run("accumulate", saved_model, "--sites", "0,2,embed", "--text", text, *TEXT, "--out", tmp_path / "m")
    assert re.search(r"3 pairs in .*Next: nnato\s+fit", again.stdout, re.DOTALL)


def test_leaps_name_the_pairs_that_exist(saved_model, text, tmp_path):
    result = run("accumulate", saved_model, "--source", "1", "--leap", "1-9", "--text", text, *TEXT, "--out", tmp_path / "m", "--json")
    assert check_envelope(result)["pairs"] == [[1, 2], [1, 3]]
    fits = check_envelope(run("fit", tmp_path / "m", "--source", "1", "--leap", "1-9", "--json"))
    assert [(fit["source"], fit["target"]) for fit in fits] == [(1, 2), (1, 3)]


def test_fit(moments, tmp_path):
    results = check_envelope(run("fit", moments, "--out", tmp_path / "operators", "--json"))
    assert [(fit["source"], fit["target"]) for fit in results] == [("embed", 2), (0, 2), (1, 3)]
    for fit in results:
        assert set(fit["r2"]) == {"variance_weighted", "uniform", "whitened"}
        assert set(fit["r2"]["uniform"]) == {"value", "low", "high"}
        assert fit["r2"]["uniform"]["low"] < fit["r2"]["uniform"]["value"] < fit["r2"]["uniform"]["high"]
        assert {"mean", "identity", "identity_shift", "identity_scaled", "random_orthogonal", "shuffled"} <= set(fit["baselines"])
        assert fit["alpha"] > 0
        assert fit["rank"] == 16
    assert sorted(os.listdir(tmp_path / "operators")) == [
        "0-2.safetensors",
        "1-3.safetensors",
        "embed-2.safetensors",
        "fit.csv",
        "fit.json",
        "fit.toml",
        "r2.png",
    ]
    table = run("fit", moments, "--pairs", "0:2", "--metric", "uniform", "--use-tokens", "all").stdout
    assert "0 → 2" in table
    assert "1 → 3" not in table
    assert "…" not in table
    assert max(len(line) for line in table.splitlines() if not line.startswith("text:")) <= 80


def widest(output):
    return max(len(line) for line in output.splitlines() if not line.startswith(("text:", "left out:")))


def test_wide_numbers_fit_into_eighty_columns(moments, monkeypatch, capsys):
    """Pairs of two digits and R² of minus twelve, as a real model has them."""
    fits = fitting.fit(load_moments(moments), [(0, 2)])
    wide = [
        dataclasses.replace(
            one,
            operator=dataclasses.replace(one.operator, source=ResidualSite(10), target=ResidualSite(12)),
            baselines={name: dict.fromkeys(METRICS, -12.34) for name in one.baselines},
            at_edge=True,
            converged=False,
        )
        for one in fits
    ]
    monkeypatch.setenv("COLUMNS", "80")
    tables.show_fits(wide, "uniform")
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "10 → 12" in shown
    assert widest(shown) <= 80


def test_a_title_stays_in_one_line(capsys):
    title = "A title of more characters than its table has columns"
    tables.console().print(tables.new_table(title, ("a", "b")))
    assert capsys.readouterr().out.splitlines()[0].rstrip() == title


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_fit_with_every_method(moments, tmp_path):
    for options in (
        ("--select", "kfold", "--standardize"),
        ("--select", "gcv", "--metric", "whitened", "--rank", "3"),
        ("--penalty", "lasso"),
        ("--penalty", "elastic-net", "--select", "kfold"),
        ("--shrink-to", "identity"),
    ):
        (result,) = check_envelope(run("fit", moments, "--pairs", "0:2", *options, "--json"))
        assert result["r2"]["variance_weighted"]["value"] > 0.1, options
        for name, value in zip(options[::2], options[1::2], strict=False):
            if name.startswith("--") and name not in ("--metric", "--standardize"):
                assert str(result[name[2:].replace("-", "_")]) == value
    run("fit", moments, "--pairs", "0:2", "--out", tmp_path / "o")
    assert {row["map"] for row in rows_of(tmp_path / "o" / "fit.csv")} >= {"transport", "identity", "random_orthogonal"}
    (saved,) = json.loads((tmp_path / "o" / "fit.json").read_text())
    assert (saved["source"], saved["target"]) == (0, 2)


def test_fit_as_in_the_paper(moments):
    result = run("fit", moments, "--pairs", "0:2", "--preset", "paper", "--json")
    (fit,) = check_envelope(result)
    assert fit["alpha"] in (0.1, 1, 10, 100, 1000, 2000, 5000, 10000)
    assert fit["select"] == "kfold"
    assert result.stderr.count("preset paper: ") == 1
    refused = run("fit", moments, "--preset", "paper", "--shrink-to", "identity", code=2)
    assert "--preset paper fixes --shrink-to: give one of them" in refused.stderr
    assert "unknown penalty" not in run("fit", moments, "--penalty", "lasso", "--rank", "3", code=2).stderr


def test_fit_shows_compositions(saved_model, text, tmp_path):
    run("accumulate", saved_model, "--sites", "0,1,3", "--text", text, *TEXT, "--out", tmp_path / "m")
    output = run("fit", tmp_path / "m", "--compose").stdout
    assert re.search(r"pair\s+through\s+direct\s+composed", output)
    assert widest(output) <= 80
    fits = check_envelope(run("fit", tmp_path / "m", "--compose", "--json"))
    assert [[entry["through"] for entry in fit["composed"]] for fit in fits] == [[], [1], []]


def test_efficiency(saved_model, text, tmp_path):
    run("accumulate", saved_model, "--sites", "all", "--text", text, *TEXT, "--out", tmp_path / "m")
    options = ["efficiency", tmp_path / "m", "--target", "3", "--force"]
    results = check_envelope(run(*options, "--leap", "1,3", "--ranks", "1,4,16", "--out", tmp_path / "o", "--json"))
    assert [(entry["source"], entry["target"]) for entry in results] == [(0, 3), (2, 3)]
    for entry in results:
        assert set(entry["sum_rho2"]) == {"in_sample", "cross_fitted", "debiased"}
        assert {"n_eff", "lts_dimensions", "participation_ratio", "participation_ratio_shuffled"} <= set(entry)
        assert {point["rank"] for point in entry["efficiency"]} <= {1, 4, 16}
        assert set(entry["efficiency"][0]) >= {"rank", "value", "low", "high"}
    assert sorted(os.listdir(tmp_path / "o")) == [
        "efficiency.csv",
        "efficiency.json",
        "efficiency.png",
        "efficiency.toml",
        "spectra.png",
        "subspace.png",
    ]
    assert json.loads((tmp_path / "o" / "efficiency.json").read_text()) == results
    table = rows_of(tmp_path / "o" / "efficiency.csv")
    assert len(table) == sum(len(entry["efficiency"]) for entry in results)
    assert float(table[0]["r2"]) == results[0]["efficiency"][0]["r2"]["value"]
    output = run(*options).stdout
    assert re.search(r"LTS\s+90 %\s+PR\s+PR shuf.", output)
    assert re.search(r"rank\s+0 → 3\s+1 → 3\s+2 → 3", output)
    assert widest(output) <= 80


def test_efficiency_as_in_the_paper(saved_model, text, tmp_path):
    run("accumulate", saved_model, "--pairs", "0:3,1:3", "--text", text, *TEXT, "--out", tmp_path / "m")
    options = ["efficiency", tmp_path / "m", "--pairs", "0:3", "--preset", "paper"]
    result = run(*options, "--out", tmp_path / "o", "--json")
    (entry,) = check_envelope(result)
    assert (entry["preset"], [point["rank"] for point in entry["efficiency"]]) == ("paper", [1, 16])
    assert result.stderr.count("preset paper: ") == 1
    assert sorted(os.listdir(tmp_path / "o")) == ["efficiency.csv", "efficiency.json", "efficiency.png", "efficiency.toml"]
    output = run(*options).stdout
    assert re.search(r"mean\s+-?\d.*\n.*dim_lin\s+\d+.*\n.*α\s+\d", output)
    assert widest(output) <= 80


def test_bad_requests_of_efficiency_are_refused(moments):
    for options, message in (
        (("--pairs", "0:2", "--target", "2"), "give --pairs, or --target with --leap, not both"),
        (("--leap", "1"), "--leap belongs to --target here"),
        (("--target", "2", "--leap", "9", "--force"), "the moments hold no pair with target 2 at these leaps"),
        (("--ranks", "1,x"), "ranks '1,x': write for example 1,10,100"),
        (("--ranks", "17"), "give numbers from 1 to 16"),
    ):
        assert message in run("efficiency", moments, *options, code=2).stderr


def test_scaling(moments, tmp_path):
    results = check_envelope(run("scaling", moments, "--pairs", "0:2,1:3", "--out", tmp_path / "o", "--json"))
    assert [(entry["source"], entry["target"]) for entry in results] == [(0, 2), (1, 3)]
    assert [point["folds"] for point in results[0]["points"]] == [1, 2, 3, 4, 5]
    assert sorted(os.listdir(tmp_path / "o")) == ["scaling.csv", "scaling.json", "scaling.png", "scaling.toml"]
    assert len(rows_of(tmp_path / "o" / "scaling.csv")) == 2 * 5 * 3
    output = run("scaling", moments, "--metric", "whitened").stdout
    assert "per doubling" in output
    assert widest(output) <= 80


def test_ablate_with_an_operator(moments, saved_model, text, tmp_path):
    run("fit", moments, "--out", tmp_path / "operators")
    operator = tmp_path / "operators" / "0-2.safetensors"
    options = ["--operator", operator, "--text", text, *TEXT, "--sequences", "4", "--positions", "3"]
    result = run("ablate", *options, "--out", tmp_path / "out", "--json")
    (results,) = check_envelope(result)
    assert (results["source"], results["target"], results["sequences"], results["positions"]) == (0, 2, 4, "3")
    assert json.loads(result.stdout)["text"]["source"] == str(text)
    by_default = run("ablate", "--operator", operator, "--sequences", "4", "--positions", "3", "--json")
    assert json.loads(by_default.stdout)["text"] == json.loads(result.stdout)["text"]  # the text it was fitted on
    assert check_envelope(by_default) == [results]
    other = text.parent / "other.jsonl"
    lines = [json.dumps({"text": file.read_text() + " w1 w2 w3"}) for file in sorted(text.glob("*.txt"))]
    other.write_text("\n".join(lines))
    elsewhere = run("ablate", "--operator", operator, "--text", other, "--sequences", "4", "--positions", "3", "--json")
    assert json.loads(elsewhere.stdout)["text"]["source"] == str(other)
    assert list(results["interventions"]) == ["none", "transport", "identity", "mean", "zero", "null_input"]
    transport = results["interventions"]["transport"]
    assert set(transport["delta_loss"]) == {"value", "low", "high"}
    assert {"log_perplexity", "kl", "loss_recovered_mean", "minus_transport"} <= set(transport)
    assert json.loads((tmp_path / "out" / "ablation.json").read_text()) == [results]
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 1000
    table = run("ablate", *options).stdout
    assert "0 → 2: 3 random positions, 4 sequences × 32 tokens, seed 0" in table
    assert max(len(line) for line in table.splitlines() if not line.startswith("text:")) <= 80


ALL_INTERVENTIONS = ",".join(INTERVENTIONS)


def test_ablate_with_everything(saved_model, text, tmp_path):
    """All interventions of a chain of pairs, several draws, reduced ranks, directions and a vector from files."""
    directions = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    save_file({"directions": directions}, tmp_path / "two.safetensors")
    save_file({"vector": directions[0].clone()}, tmp_path / "one.safetensors")
    options = ["--model", saved_model, "--pairs", "0:1,1:3", "--text", text, *TEXT, "--sequences", "3", "--positions", "3", "--seeds", "2"]
    options += ["--interventions", ALL_INTERVENTIONS, "--rank", "2,16"]
    options += ["--features", tmp_path / "two.safetensors", "--steer", tmp_path / "one.safetensors", "--scale", "0"]
    (chain,) = check_envelope(run("ablate", *options, "--chain", "--json", "--out", tmp_path / "o"))
    assert chain["chain"] == [[0, 1], [1, 3]]
    assert chain["seeds"] == [0, 1]
    assert chain["tokens"] == 96
    assert len(chain["draws"]) == 2
    effects = chain["interventions"]
    assert list(effects) == ["none", *INTERVENTIONS, "rank_2", "rank_16"]
    assert abs(effects["steer"]["delta_loss"]["value"]) < 1e-6  # a vector times zero
    assert effects["rank_16"]["delta_loss"]["value"] == pytest.approx(effects["transport"]["delta_loss"]["value"], abs=1e-5)
    assert effects["rank_2"]["edit"]["rank"] == 2
    assert set(effects["transport"]["loss_recovered"]) == {"mean", "zero", "resample"}
    assert [one["distance"] for one in effects["zero"]["by_distance"]][:3] == [[0, 0], [1, 1], [2, 3]]
    assert {"kl_at_edit", "kl_after", "agreement", "ce_loss_score"} <= set(effects["zero"])
    output = run("ablate", *options).stdout
    assert "0 → 1: 3 random positions, 2 seeds, 3 sequences × 32 tokens, seeds 0 to 1" in output
    assert widest(output) <= 80
    assert "…" not in output
    assert all(output.count(f"\n{name} ") == 6 for name in INTERVENTIONS)  # two pairs, three tables each; no name is cut
    assert "KL after is 0 where the target is the last block" in " ".join(output.split())  # 1 → 3
    elsewhere = run("ablate", *options, "--pairs", "0:1").stdout
    assert "KL after is 0" not in " ".join(elsewhere.split())


def test_ablate_takes_as_many_sequences_as_a_small_text_has(moments, saved_model, text, tmp_path):
    run("fit", moments, "--pairs", "0:2", "--out", tmp_path / "operators")
    options = ["--operator", tmp_path / "operators" / "0-2.safetensors", "--text", text, "--context", "32", "--positions", "3"]
    options += ["--tokens", "2000"]
    result = run("ablate", *options)
    count = int(re.search(r"(\d+) sequences instead of 24: the test documents hold no more of 32 tokens", result.stderr)[1])
    assert 2 <= count < 24
    assert f"{count} sequences × 32 tokens" in result.stdout
    assert run("ablate", *options, "--sequences", count, "--quiet").stdout == result.stdout
    refused = run("ablate", *options, "--sequences", count + 1, code=2)
    assert f"{count + 1} sequences of 32 tokens were asked for, but the test documents hold {count}; " in refused.stderr
    assert f"or ask for {count} (--sequences {count};" in refused.stderr


def test_ablate_at_other_positions(moments, text, tmp_path):
    run("fit", moments, "--pairs", "0:2", "--out", tmp_path / "operators")
    operator = tmp_path / "operators" / "0-2.safetensors"
    save_file({"directions": torch.ones(1, 16)}, tmp_path / "one.safetensors")
    for positions, edited in (("last", [30]), ("every:9", [9, 18, 27])):
        options = ["--operator", operator, "--positions", positions, "--sequences", "3", "--rank", "2", "--json"]
        (result,) = check_envelope(run("ablate", *options))
        assert result["edited_positions"] == 3 * [edited]
        assert result["interventions"]["rank_2"]["edit"]["rank"] == 2
    features = ["--positions", "active>1e9", "--features", tmp_path / "one.safetensors", "--sequences", "3"]
    assert "only 0 of 3 sequences have positions 'active>1" in run("ablate", "--operator", operator, *features, code=2).stderr


def test_generate(moments, saved_model, tmp_path):
    run("fit", moments, "--pairs", "0:2,1:3", "--out", tmp_path / "operators")
    files = [tmp_path / "operators" / name for name in ("0-2.safetensors", "1-3.safetensors")]
    options = ["generate", "w1 w2 w3", "--operator", files[0], "--operator", files[1], "--max-new-tokens", "4"]
    record = json.loads(run(*options, "--json").stdout)["results"]
    assert record["pairs"] == [[0, 2], [1, 3]]
    assert list(record["edited"]) == ["transport", "identity"]
    assert len(record["unedited"]["ids"]) <= 4
    output = run(*options, "--interventions", "zero").stdout
    assert "zero at 0 → 2, 1 → 3; as unedited for" in output
    assert "w1 w2 w3" in output


def test_ablate_fits_what_it_needs_and_caches_it(saved_model, text, tmp_path):
    options = ["--model", saved_model, "--pairs", "0:2", "--text", text, *TEXT, "--sequences", "3", "--json"]
    first = check_envelope(run("ablate", *options))
    cached = list((tmp_path / "cache" / "moments").glob(f"*/{FILE}"))
    assert len(cached) == 1
    stamp = cached[0].stat().st_mtime_ns
    assert check_envelope(run("ablate", *options)) == first
    assert cached[0].stat().st_mtime_ns == stamp


def test_info(moments, saved_model, tmp_path):
    record = check_envelope(run("info", moments, "--json"))
    assert record["kind"] == "moments"
    assert record["cursor"] == record["batches"]
    lines = run("info", moments).stdout.splitlines()
    size = sum(path.stat().st_size for path in moments.glob("*.safetensors"))
    assert lines[0] == f"moments in {moments}, {size / 1e6:,.1f} MB on disk"
    assert "4 blocks, width 16, float32" in lines[1]
    assert "60 documents, sequences of 32 tokens" in lines[2]
    assert all(f"{record['text']['split_tokens'][split]:,} {split}" in lines[3] for split in ("train", "validation", "test"))
    assert lines[4:6] == ["pairs:   3: embed:2, 0:2, 1:3", "folds:   5 of the train and of the test documents"]
    assert lines[6] == f"made by: {record['provenance']['command']}"
    assert len(lines) == 8
    run("fit", moments, "--pairs", "0:2", "--out", tmp_path / "o")
    operator = json.loads(run("info", tmp_path / "o" / "0-2.safetensors", "--json").stdout)["results"]
    assert operator["kind"] == "operator"
    model = json.loads(run("info", saved_model, "--json").stdout)["results"]
    assert (model["blocks"], model["default_pairs"]) == (4, ["2:3"])
    assert "Gemma2ForCausalLM" in run("info", saved_model).stdout


def test_demo(saved_model, text, tmp_path, monkeypatch):
    from nnato import accumulation
    from nnato.corpus import Corpus

    monkeypatch.setattr(accumulation, "default_corpus", lambda info: Corpus(str(text), context=32, per_document=None))
    monkeypatch.setattr("nnato.cli.demo.SEQUENCES", 4)
    out = tmp_path / "demo"
    results = check_envelope(run("demo", "--model", saved_model, "--out", out, "--json"))
    assert {path.name for path in out.iterdir()} == {"r2.png", "ablation.png", "results.json", "demo.toml"}
    assert json.loads((out / "results.json").read_text()) == results
    assert len(results["fit"]) == 6
    text_output = run("demo", "--model", saved_model, "--out", out).stdout
    assert "R² on test documents" in text_output
    assert "recov." in text_output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    output = run(command, "--help").stdout
    assert "Usage" in output
    assert "\\b" not in output


def test_help_lists_commands_and_version():
    output = run("--help").stdout
    assert all(command in output for command in COMMANDS)
    assert "nnato" in run("--version").stdout
    assert "no command 'nothing'; nnato --help lists all" in run("nothing", code=2).output


@pytest.mark.parametrize("group", ["sae", "features", "lens", "mlsae"])
def test_the_help_of_a_group_is_not_cut(group):
    output = run(group, "--help").stdout
    listed = output[output.index("Commands:") :]
    assert "..." not in listed
    names = list(import_module(f"nnato.cli.{group}").command.commands)
    assert re.findall(r"^  (\w+)", listed, re.MULTILINE) == names


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["accumulate", "nothing"], "no model 'nothing'"),
        (["accumulate", "MODEL", "--sites", "9"], "site 9 does not exist: the model has blocks 0 … 3"),
        (["accumulate", "MODEL", "--sites", "1"], "a pair needs two sites"),
        (["accumulate", "MODEL", "--pairs", "2:1"], "pair 2:1: the source must come before the target"),
        (["accumulate", "MODEL", "--pairs", "1"], "'1' is not a pair"),
        (["accumulate", "MODEL", "--source", "1"], "--source and --leap belong together"),
        (["accumulate", "MODEL", "--pairs", "0:1", "--leap", "1"], "not both"),
        (["accumulate", "MODEL", "--pairs", "0:1", "--sites", "1"], "not both"),
        (["accumulate", "MODEL", "--text", "nowhere"], "no text 'nowhere'"),
        (["accumulate", "MODEL", "--context", "2"], "context 2: a block needs at least 8 tokens"),
        (["fit", "nothing"], "no moments in nothing: give the --out folder of nnato accumulate"),
        (["fit", "MODEL"], "no moments in "),
        (["ablate", "--positions", "x"], "positions 'x': give a number to draw"),
        (
            ["ablate", "--model", "MODEL", "--positions", "31", *TEXT],
            "31 positions were asked for, but of 32 tokens at most 30 can be edited",
        ),
        (["ablate", "--model", "MODEL", "--positions", "0,5", *TEXT], "position 0 cannot be edited"),
        (["ablate", "--positions", "²"], "positions '²': give a number to draw"),
        (["ablate", "--model", "MODEL", "--sequences", "1", *TEXT, "--text", "TEXT"], "1 sequences: an interval needs at least 2"),
        (["ablate", "--model", "MODEL", "--sequences", "999", *TEXT, "--text", "TEXT"], "999 sequences of 32 tokens were asked for"),
        (["ablate", "--model", "MODEL", "--device", "gpu7"], "device 'gpu7' cannot be used"),
        (["ablate", "--model", "MODEL", "--context", "513", "--text", "TEXT"], "context 513: the model takes at most 512 tokens"),
        (["ablate", "--interventions", "transport,noise"], "unknown intervention 'noise'"),
        (["ablate", "--operator", "none.safetensors"], "none.safetensors does not exist"),
        (["ablate", "--operator", "x", "--pairs", "0:1"], "give --operator or pairs, not both"),
        (["ablate", "--model", "MODEL", "--pairs", "3:3"], "the source must come before the target"),
        (["ablate", "--seeds", "2", "--positions", "all"], "positions 'all' are not drawn, so 2 seeds would give the same"),
        (["ablate", "--operator", "x", "--interventions", "shuffled"], "shuffled comes from moments, which an operator file has not"),
        (["ablate", "--interventions", "features"], "the intervention features needs a file of directions: give --features"),
        (["ablate", "--interventions", "steer", "--steer", "no.safetensors"], "no.safetensors does not exist"),
        (["ablate", "--steer", "no.safetensors"], "--steer belongs to the intervention steer"),
        (["ablate", "--rank", "x"], "ranks 'x': write for example 1,10,100"),
        (["generate", "words"], "give --transport, for example 9:12, or --operator"),
        (["generate", "words", "--transport", "0:2", "--operator", "any.safetensors"], "give --transport or --operator, not both"),
        (["accumulate", "MODEL", "--text", "no-such-folder/"], "no text 'no-such-folder/': not 'python-docs'"),
        (["info", "no-such-folder/"], "no model 'no-such-folder/'"),
        (["generate", "words", "--model", "MODEL", "--transport", "3:3"], "the source must come before the target"),
        (["info", "nothing"], "no model 'nothing'"),
        (["info", "."], "holds neither moments nor a model (config.json): name one of its files, for example FILE.safetensors"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, message, saved_model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(saved_model), "TEXT": str(text)}
    arguments = [names.get(argument, argument) for argument in arguments]
    if arguments[0] == "accumulate" and "--text" not in arguments:
        arguments += ["--text", str(text)]
    result = run(*arguments, code=2)
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")  # on a busy machine a stage may have said before how long it takes
    assert result.stdout == ""
    assert not list((tmp_path / "cache").rglob(FILE))  # refused before the long part


def test_unwritable_output_is_refused_first(saved_model, moments, tmp_path):
    blocker = tmp_path / "blocker"
    blocker.touch()
    for arguments in (["accumulate", "nothing"], ["fit", moments], ["ablate", "--model", "nothing"], ["demo", "--model", "nothing"]):
        result = run(*arguments, "--out", blocker / "x", code=2)
        assert "cannot write to" in result.stderr


def test_a_second_process_in_an_output_folder_is_refused(moments, saved_model, text, tmp_path):
    """One process keeps the folder, the command is another one; what the folder held stays, and afterwards it may be written to."""
    out = tmp_path / "out"
    run("fit", moments, "--out", out)
    operator = out / "0-2.safetensors"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    fit = ["fit", str(moments), "--out", str(out)]
    ablate = ["ablate", "--operator", str(operator), "--model", str(saved_model), "--text", str(text), *TEXT, "--out", str(out)]
    with exclusive(out):
        for command in (fit, ablate):
            second = subprocess.run(
                [sys.executable, "-c", "from nnato.cli import main; main()", *command], capture_output=True, text=True, check=False
            )
            assert second.returncode == 1
            assert f"another process is working on {out}; wait for it to end, or choose another folder with --out" in second.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run(*fit)


def test_the_folder_is_kept_until_the_command_ends(moments, tmp_path, monkeypatch):
    out, refused, fit = tmp_path / "out", [], fitting.fit

    def meanwhile(*arguments, **options):
        with pytest.raises(OutputError, match="another process is working on"), exclusive(out):
            pass
        refused.append(True)
        return fit(*arguments, **options)

    monkeypatch.setattr(fitting, "fit", meanwhile)
    run("fit", moments, "--out", out)
    assert refused
    with exclusive(out):
        pass


def test_moments_of_another_width_are_refused(moments, tmp_path, text, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "wide"
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run("fit", moments, "--out", tmp_path / "o")
    result = run("ablate", "--operator", tmp_path / "o" / "0-2.safetensors", "--model", folder, "--text", text, *TEXT, code=2)
    assert "maps width 16 to 16" in result.stderr
    result = run("accumulate", folder, "--pairs", "0:2", "--text", text, *TEXT, "--out", moments, code=2)
    assert "holds moments of another model" in result.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_checkpoints_and_says_so(saved_model, text, tmp_path):
    command = [sys.executable, "-c", "from nnato.cli import main; main()", "accumulate", str(saved_model), "--text", str(text), *TEXT]
    command += ["--out", str(tmp_path / "m"), "--batch-size", "1", "--checkpoint-every", "1"]
    for _ in range(20):  # a job that ends before the signal comes is started again
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NNATO_CACHE": str(tmp_path)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell ignores for what it starts with &
        )
        while not (tmp_path / "m" / FILE).exists():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        if process.returncode != 0:
            break
        shutil.rmtree(tmp_path / "m")
    assert process.returncode == 130
    assert re.search(r"interrupted: kept \S*moments.safetensors \(\d+ of \d+ forward passes\)", stderr)
    cursor = json.loads(run("info", tmp_path / "m", "--json").stdout)["results"]["cursor"]
    assert cursor >= 1
    run("accumulate", saved_model, "--text", text, *TEXT, "--out", tmp_path / "m", "--batch-size", "1", "--checkpoint-every", "1")


@pytest.mark.model
@pytest.mark.slow
def test_ablate_on_the_embedded_model(tmp_path):
    """The main job on real weights: transport beats every reference, with intervals apart (small text, few sequences)."""
    out = run(
        "ablate", "--pairs", "12:17", "--tokens", "12000", "--sequences", "6", "--interventions", "transport,identity,mean,zero", "--json"
    )
    (result,) = json.loads(out.stdout)["results"]
    effects = result["interventions"]
    transport = effects["transport"]["delta_loss_at_edit"]
    for name in ("identity", "mean", "zero"):
        assert effects[name]["delta_loss_at_edit"]["low"] > transport["high"]
        assert effects[name]["minus_transport"]["low"] > 0
    assert effects["none"]["log_perplexity"] < 4.5


def test_a_missing_text_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(main, ["accumulate", "no-model-either/", "--text", "typo/", "--out", "made"])
    assert refused.exit_code == 2
    assert "no text 'typo/'" in refused.output
    assert not (tmp_path / "made").exists()
    refused = CliRunner().invoke(main, ["accumulate", "no-model-either/", "--out", "made"])
    assert refused.exit_code == 2
    assert "no model 'no-model-either/'" in refused.output
    assert not (tmp_path / "made").exists()  # nothing is in it
