"""The report: every number is one of a JSON file, nothing is loaded, nothing of a file becomes code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from nnato.cli import main
from nnato.errors import FileFormatError
from nnato.report import MOST_ROWS, collect, tables_of, write_report

TEXT = ["--context", "32", "--per-document", "0", "--tokens", "100000"]


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


class Page(HTMLParser):
    """Cells with their attributes, and every address that a page names."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.addresses, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "td" and "data-path" in attributes:
            self.cells.append((attributes["data-path"], attributes["data-value"]))


def look_up(folder, path):
    """The value that a path such as `fit.json[0].r2["a b"]` names."""
    file, rest = re.match(r"(.*?\.json)(.*)", path).groups()
    value = json.loads((folder / file).read_text())
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\"(?:[^\"\\]|\\.)*\")\]", rest):
        value = value[name] if name else value[json.loads(index)]
    return value


@pytest.fixture(scope="module")
def results(saved_model, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNATO_CACHE", str(folder.parent / "cache"))
        run("accumulate", saved_model, "--pairs", "0:2,1:3", "--text", text, *TEXT, "--out", folder / "moments")
        run("fit", folder / "moments", "--out", folder / "fit")
        run("efficiency", folder / "moments", "--force", "--out", folder / "efficiency")
        run("scaling", folder / "moments", "--out", folder / "scaling")
        options = ["--sequences", "4", "--interventions", "transport,mean,zero"]
        run("ablate", "--operator", folder / "fit" / "0-2.safetensors", *options, "--out", folder / "ablate")
    return folder


def test_every_number_is_one_of_a_json_file(results):
    page = Page(write_report(results).read_text())
    assert len(page.cells) > 300
    for path, value in page.cells:
        assert look_up(results, path) == json.loads(value), path
    files = {path.split(".json")[0] for path, _ in page.cells}
    assert files == {"fit/fit", "efficiency/efficiency", "scaling/scaling", "ablate/ablation"}


def test_every_interval_is_shown(results):
    shown = {path for path, _ in Page(write_report(results).read_text()).cells}
    for number, fit in enumerate(json.loads((results / "fit" / "fit.json").read_text())):
        for metric in fit["r2"]:
            assert f"fit/fit.json[{number}].r2.{metric}" in shown
    (result,) = json.loads((results / "ablate" / "ablation.json").read_text())
    for name in result["interventions"]:
        assert f'ablate/ablation.json[0].interventions["{name}"].log_perplexity' in shown


def test_the_page_stands_alone_and_says_how_to_redo_it(results):
    page = write_report(results)
    text = page.read_text()
    assert all(address.startswith("data:") or (results / address).exists() for address in Page(text).addresses)
    assert not re.search(r"https?:|url\(|import|fetch", re.sub(r"data:image/png;base64,[^\"]*", "", text))
    assert "default-src 'none'" in text
    for command in ("accumulate", "fit", "efficiency", "scaling", "ablate"):
        assert f"nnato {command} --config" in text
    assert text.count("data:image/png") == len(list(results.rglob("*.png")))
    contents = collect(results)
    assert {one["kind"] for one in contents.artefacts} >= {"moments", "operator"}
    assert not contents.unread


def test_nothing_of_a_file_becomes_code(tmp_path):
    evil = "</td><script>alert(1)</script>"
    (tmp_path / "a.json").write_text(json.dumps([{"name": evil, evil: 1, "value": 2}]))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "foreign.safetensors").write_bytes(b"x")
    text = write_report(tmp_path).read_text()
    assert Page(text).tags.count("script") == 1
    contents = collect(tmp_path)
    assert set(contents.unread) == {"broken.json", "deep.json", "foreign.safetensors"}
    for path, value in Page(text).cells:
        assert look_up(tmp_path, path) == json.loads(value)


def test_shapes_of_json():
    record = {"model": "m", "rows": [{"a": 1, "kl": {"value": 0.5, "low": None, "high": None}, "long": [[1, 2]] * 9}], "seeds": [0, 1]}
    single, rows = tables_of("x.json", record)
    assert (single.title, list(single.columns)) == ("", ["model", "seeds"])
    assert single.rows[0]["seeds"].text == "0, 1"
    assert rows.rows[0]["kl"].text == "0.5"
    assert rows.left_out == {"long": "9 × 2"}
    nested = tables_of("x.json", [{"source": 3, "by": {"mean": {"r2": 0.25}, "zero": {"r2": None}}}])
    (inner,) = (table for table in nested if table.title == "by")
    assert [{head: cell.text for head, cell in row.items()} for row in inner.rows] == [
        {"source": "3", "by": "mean", "r2": "0.25"},
        {"source": "3", "by": "zero", "r2": "–"},
    ]
    assert inner.rows[0]["r2"].path == 'x.json[0].by["mean"].r2'
    (long,) = tables_of("x.json", [{"feature": number} for number in range(MOST_ROWS + 5)])
    assert (len(long.rows), long.more) == (MOST_ROWS, 5)
    assert tables_of("x.json", [1, 2]) == []


def test_folders_without_results_are_refused(tmp_path):
    with pytest.raises(FileFormatError, match="is no folder"):
        write_report(tmp_path / "none")
    with pytest.raises(FileFormatError, match="holds no results"):
        write_report(tmp_path)
    assert "holds no results" in run("report", tmp_path, code=2).stderr


def test_command(results):
    assert "report.html" in run("report", results).stdout
    assert json.loads(run("report", results, "--json").stdout)["results"]["bytes"] > 1000


PROBE = """<script>
const seen = {errors: [], sorted: []};
window.addEventListener("error", (event) => seen.errors.push(event.message));
const table = document.querySelector("section table"), heads = [...table.querySelectorAll("th button")];
const place = heads.findIndex((head) => head.textContent === "alpha");
const column = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[place].dataset.order));
for (let turn = 0; turn < 2; turn++) { heads[place].click(); seen.sorted.push(column()); }
const box = document.getElementById("search");
const shown = () => [...document.querySelectorAll("section tbody tr")].filter((row) => row.getClientRects().length).length;
seen.all = shown();
box.value = "shuffled"; box.dispatchEvent(new Event("input"));
seen.found = shown(); seen.said = document.getElementById("count").textContent;
box.value = "source:0 2"; box.dispatchEvent(new Event("input"));
seen.pair = [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
box.value = "nothing like it"; box.dispatchEvent(new Event("input"));
seen.none = shown();
box.value = ""; box.dispatchEvent(new Event("input"));
document.querySelector("td[data-path]").click();
seen.cell = document.getElementById("count").textContent;
seen.wider = document.documentElement.scrollWidth > window.innerWidth;
document.body.setAttribute("data-seen", JSON.stringify(seen));
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to open the page in")
@pytest.mark.parametrize("width", [1280, 500])
def test_sorting_and_searching_in_a_browser(results, tmp_path, width):
    page = tmp_path / "probe.html"
    text = write_report(results / "fit").read_text()
    page.write_text(text.replace("</body>", PROBE))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},900"]
    shown = subprocess.run(["chromium", *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    parsed = re.search(r'data-seen="([^"]*)"', shown.stdout)
    seen = json.loads(unescape(parsed[1]))
    assert seen["errors"] == []
    rising, falling = seen["sorted"]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert rising
    assert 0 == seen["none"] < seen["found"] < seen["all"]
    assert seen["pair"] == ["0"]
    assert seen["said"] == f"{seen['found']} of {seen['all']} rows"
    assert re.match(r"fit.json\[\d\]\.\w+ = ", seen["cell"])
    assert not seen["wider"]  # tables scroll, the page does not
