from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from workbench.errors import DataError
from workbench.plots import line_plot, new_figure
from workbench.report import (
    Experiment,
    find_runs,
    format_seconds,
    label_of,
    main,
    render,
    safe_svg,
)
from workbench.run import Run, RunOptions

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
VOID = {"meta", "link", "br", "img", "hr", "input"}


@dataclass(frozen=True)
class Unit:
    k: int = 0
    text: str = ""
    run: RunOptions = field(default_factory=RunOptions)


def make(root: Path, package: str, k: int = 0, text: str = "plain", rows: int = 3) -> Path:
    unit = Unit(k=k, text=text, run=RunOptions(root=root))
    with Run.open(f"{package}.train", unit) as run:
        data = [{"bits": b, "perplexity": 4.0 / b, "low": 3.5 / b, "high": 4.5 / b} for b in (1, 2)]
        figure, axes = new_figure()
        line_plot(axes, data, x="bits", y="perplexity", low="low", high="high", title=text)
        run.figure("curve", figure, data, caption=f"{text} n = 2", alt=f"{text} falls")
        run.table(
            "scores", [{"method": text, "value": 0.25 + i} for i in range(rows)], caption=text
        )
        run.finish(
            {"accuracy": 0.9371, "train_seconds": 1.0, "n_items": 1280},
            title=f"{package} {text}",
            question=f"{text}?",
            summary=f"{text}.",
        )
    return run.directory


class Page(HTMLParser):
    """Collects elements and checks that they nest."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.faults: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for package in ("mad", "lplr_q", "sdm"):
        make(root, package)
    return root


@pytest.fixture(scope="module")
def page(runs) -> Page:
    finished, unfinished = find_runs([runs])
    return Page(render(finished, unfinished, title="The tour", introduction="All of it."))


def test_page_is_well_formed_and_names_everything(page):
    assert not page.faults
    assert not page.open
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("title")) == 1 + 3  # the page and each drawing
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    for attributes in page.all("svg"):
        assert attributes["role"] == "img"
        for name in attributes["aria-labelledby"].split():
            assert name in ids
    targets = {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")}
    assert targets <= set(ids)


def test_page_asks_for_nothing_and_runs_nothing(runs):
    html = render(find_runs([runs])[0], title="T")
    assert not Page(html).all("script")
    addresses = set(re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", html))
    assert all(a.startswith(("#", "data:")) for a in addresses)
    outside = set(re.findall(r"https?://[^\s\"'<>)]+", html))
    assert outside <= {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert "default-src 'none'" in html
    assert len(html.encode()) < 1_000_000


def test_each_run_shows_question_figure_table_command_and_seconds(page, runs):
    text = " ".join(" ".join(page.text).split())
    for package in ("mad", "lplr_q", "sdm"):
        assert f"{package} plain" in text
    assert text.count("plain?") == 3
    assert text.count("How this was made") == 3
    assert len(page.all("figcaption")) == 3
    assert len(page.all("details")) == 6  # the table behind each figure, and all numbers
    assert "0.9371" in text
    assert "0.937" in text  # on the card
    assert "train seconds" in text
    results = json.loads(next(runs.glob("mad/*/results.json")).read_text(encoding="utf-8"))
    assert results["command"].split()[0] in text


def test_figures_follow_light_and_dark(runs):
    html = render(find_runs([runs])[0])
    drawing = html[html.index("<svg") : html.index("</svg>")]
    assert "var(--ink)" in drawing
    assert "#1f2430" not in drawing
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_text_of_a_run_is_escaped_everywhere(tmp_path):
    folder = make(tmp_path, "mad", text=EVIL)
    page = Page(render([folder], title=EVIL, introduction=EVIL))
    assert not page.faults
    assert not page.all("script")
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert not page.all("img")
    assert "alert(1)" in " ".join(page.text)  # shown as text


def test_a_drawing_is_rebuilt_from_allowed_parts():
    evil = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
      viewBox="0 0 10 20" onload="alert(1)"><script>alert(2)</script><g id="a" onclick="x()">
      <path d="M0 0" style="fill: url(http://evil/x); clip-path: url(#c)"/>
      <path style="fill: #1f2430"/><use xlink:href="http://evil/y#z" /><use xlink:href="#a"/>
      <image xlink:href="https://evil/p.png"/><foreignObject><b>t</b></foreignObject>
      <text>a &lt;b&gt;</text></g></svg>"""
    made = safe_svg(evil, "p", "T & t", "d")
    assert "evil" not in made
    assert "alert" not in made
    assert "onclick" not in made
    assert "foreignObject" not in made
    assert 'id="p-a"' in made
    assert 'href="#p-a"' in made
    assert "fill: var(--ink)" in made
    assert "a &lt;b&gt;" in made
    assert "T &amp; t" in made
    assert 'viewBox="0 0 10 20"' in made
    local = '<svg viewBox="0 0 1 1"><g><path style="clip-path: url(#c)"/></g></svg>'
    assert "url(#q-c)" in safe_svg(local, "q", "", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<!DOCTYPE s [<!ENTITY a "b">]><svg>&a;</svg>', "entities"),
        ("<svg><g></svg>", "damaged"),
        ("<html></html>", "expected <svg>"),
    ],
)
def test_what_is_no_drawing_is_refused(text, message):
    with pytest.raises(DataError, match=message):
        safe_svg(text, "p", "t", "d", "x.svg")


def test_a_huge_drawing_becomes_its_picture(tmp_path):
    folder = make(tmp_path, "mad")
    svg = folder / "figures" / "curve.svg"
    points = "".join(f'<path d="M{i} 0L{i} 9"/>' for i in range(9000))
    text = svg.read_text(encoding="utf-8").replace("</svg>", points + "</svg>")
    svg.write_text(text, encoding="utf-8")
    images = Page(render([folder])).all("img")
    assert len(images) == 1
    assert images[0]["alt"] == "plain falls"
    assert images[0]["src"].startswith("data:image/png;base64,")
    (folder / "figures" / "curve.png").unlink()
    assert len(Page(render([folder])).all("svg")) == 1  # better large than absent
    svg.unlink()
    assert "missing or too large" in render([folder])


def test_long_tables_are_cut_and_say_so(tmp_path):
    html = render([make(tmp_path, "mad", rows=100)])
    assert html.count("<tr>") < 60
    assert "60 more rows in scores.csv" in html


def test_names_cannot_leave_the_folder(tmp_path):
    folder = make(tmp_path, "mad")
    path = folder / "results.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    for name in ("../../secret", "a/b", "..", ""):
        record["tables"] = [{"name": name}]
        path.write_text(json.dumps(record), encoding="utf-8")
        with pytest.raises(DataError, match="no file name"):
            render([folder])


def test_runs_are_found_below_folders_and_unfinished_ones_listed(runs, tmp_path):
    root = Path(shutil.copytree(runs, tmp_path / "runs"))
    half = root / "mad" / "train-half"
    half.mkdir()
    (half / "config.yaml").write_text("k: 1\n", encoding="utf-8")
    finished, unfinished = find_runs([root / "mad", root / "sdm", root / "mad"])
    assert [p.parent.name for p in finished] == ["mad", "sdm"]
    assert unfinished == [half]
    assert "train-half" in render(finished, unfinished)
    with pytest.raises(DataError, match="1 unfinished"):
        find_runs([half])
    with pytest.raises(DataError, match="no such run folder"):
        find_runs([root / "none"])


def test_runs_of_another_script_are_its_parts_and_each_package_has_one_card(tmp_path):
    folders = {name: make(tmp_path, "mad", k=k) for k, name in enumerate(("one", "two", "all"))}
    folders["sdm"] = make(tmp_path, "sdm")
    for name, folder in folders.items():
        path = folder / "results.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        package = "sdm.train" if name == "sdm" else "mad.compare"
        record["command"] = f"python -m {package} --k 3"
        record["script"] = "compare" if name == "all" else "train"
        record["title"] = f"title {name}"
        path.write_text(json.dumps(record), encoding="utf-8")
    page = Page(render(list(folders.values()), order="given"))
    text = " ".join(" ".join(page.text).split())
    assert "2 runs it consists of" in text
    assert text.count("How this was made") == 2
    cards = [a for a in page.all("div") if str(a.get("class", "")).startswith("card ")]
    assert len(cards) == 2
    alone = Page(render([folders["one"], folders["two"]]))  # without the comparison: own runs
    assert " ".join(alone.text).count("How this was made") == 2


def test_headlines_are_results_not_settings():
    from workbench.report import headlines_of

    values = {"n_rows": 3, "best_epoch": 7, "test_accuracy": 0.9, "test_accuracy_low": 0.8, "q": 2}
    assert headlines_of(values) == [("test accuracy", "0.9"), ("q", "2")]
    assert headlines_of({"steps": 4, "ok": True}) == [("steps", "4")]


def test_order_is_by_start_or_as_given(tmp_path):
    folders = [make(tmp_path, name) for name in ("aa", "bb")]
    for folder, start in zip(folders, ("2026-02", "2026-01"), strict=True):
        path = folder / "environment.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**content, "started": start}), encoding="utf-8")
    by_time, given = render(folders), render(folders, order="given")
    assert by_time.index("bb plain") < by_time.index("aa plain")
    assert given.index("aa plain") < given.index("bb plain")


def test_main_writes_the_page_and_ignores_it_among_its_inputs(runs, tmp_path):
    out = tmp_path / "report.html"
    out.write_text("old", encoding="utf-8")
    result = main(Experiment(runs=(runs, out), out=out, title="X"))
    assert result["runs"] == 3
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(DataError, match="no runs given"):
        main(Experiment())


def test_script_answers_help_typos_and_missing_folders(run_module):
    helped = run_module("workbench.report", "--help")
    assert helped.returncode == 0
    assert "--title" in helped.stdout
    typo = run_module("workbench.report", "x", "--titel", "y")
    assert typo.returncode == 2
    assert "--title" in typo.stderr + typo.stdout
    missing = run_module("workbench.report", "nowhere")
    assert missing.returncode == 2
    assert "nowhere: no such run folder" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.24, "8.2 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


def test_labels_are_words():
    assert label_of("eval/bits_per_weight") == "eval · bits per weight"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no headless Chromium here")
def test_chromium_loads_it_without_a_request_or_console_error(runs, tmp_path):
    out = tmp_path / "report.html"
    main(Experiment(runs=(runs,), out=out))
    log = tmp_path / "net.json"
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={log}",
            "--window-size=420,900",
            "--dump-dom",
            out.as_uri(),
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
        check=False,
    )
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<svg") == 3
    requests = set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text(encoding="utf-8")))
    own = ("google.com", "googleapis.com", "gstatic.com", "gvt1.com")  # the browser's own chatter
    assert not [url for url in requests if not any(host in url for host in own)]
