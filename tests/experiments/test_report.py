"""The page: every number is that of its JSON file, nothing is loaded, and what is missing is said."""

import json
import math
import re
from pathlib import Path

import pytest

from helmholtz.experiments.records import fold
from helmholtz.experiments.report.charts import Curve, dot_chart, heat_charts, line_chart
from helmholtz.experiments.report.nodes import Node, grouped, number, ordered, read_node
from helmholtz.experiments.report.page import SECTIONS, build_sections, render
from helmholtz.experiments.report.parts import Section, Table, locate, locate_queue
from report_page import check_page, value_at

ROOT = Path(__file__).parents[2]


def test_every_number_is_that_of_its_file_and_nothing_is_loaded(page):
    assert check_page(page, ROOT) > 300
    assert "<script src" not in page


def test_the_check_finds_a_wrong_digit_an_unnamed_number_and_an_address(page):
    cell = re.search(r'data-spec="\.3f"[^>]*>(\d\.\d\d\d) ±', page)
    wrong = page[: cell.start(1)] + "9.999" + page[cell.end(1) :]
    with pytest.raises(AssertionError):
        check_page(wrong, ROOT)
    with pytest.raises(AssertionError, match="names no source"):
        check_page(page.replace("</tbody>", "<tr><td>12</td></tr></tbody>", 1), ROOT)
    with pytest.raises(AssertionError, match="elsewhere"):
        check_page(page.replace("<main>", '<main><img src="//elsewhere/x.png">'), ROOT)


def test_every_section_has_its_parts(page):
    for build in SECTIONS:
        assert page.count(f'<section id="{build([ROOT / "nowhere"]).anchor}">') == 1
    assert page.count("<h2>") == len(SECTIONS) == page.count("How to have it again")
    assert page.count("<svg") >= 12
    assert "currentColor" in page and "#123456" not in page
    for word in ("commit", "processor", "seeds", "training tokens"):
        assert f"<dt>{word}</dt>" in page


def test_without_results_every_section_says_so(tmp_path):
    page = render(build_sections([tmp_path]), [tmp_path])
    assert page.count("no results yet</small>") == page.count("No results yet: nothing at") == len(SECTIONS)
    assert "<table" not in page and "helmholtz study selection run" in page


def test_folders_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="folders"):
        build_sections([tmp_path / "missing"])
    with pytest.raises(ValueError, match="folders"):
        build_sections([])


def queue(folder, **results):
    (folder / "results").mkdir(parents=True)
    for name, content in results.items():
        (folder / "results" / f"{name}.json").write_text(json.dumps(content))


def mad_run(task, model, seed, score):
    return {"settings": {"task": task, "model": model, "seed": seed}, "result": {"score": score}}


def test_mad_tables_say_what_is_missing_of_the_grid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    queue(
        tmp_path / "mad" / "quick",
        a=mad_run("compression", "fem_softmax", 0, 0.5), b=mad_run("compression", "attention", 0, 0.25),
        c=mad_run("compression", "attention", 1, 0.75), d=mad_run("memorization", "attention", 0, None),
    )  # fmt: skip
    section = next(s for s in build_sections([tmp_path]) if s.anchor == "mad")
    (table,) = section.tables
    assert [row[0].text for row in table.rows] == ["attention", "fem softmax"]
    assert table.columns == ("model", "memorization", "compression"), "in the order of the profile"
    assert [cell.text for cell in table.rows[0][1:]] == ["", "50.0% ± 35.4%"]
    assert table.rows[1][2].text == "50.0%"
    assert section.missing[:2] == ("memorization: 1 of 16 runs", "compression: 3 of 16 runs")
    assert "selective-copying: 0 of 16 runs" in section.missing and len(section.missing) == 6
    assert check_page(render([section], [tmp_path]), tmp_path) >= 2


def test_a_run_is_shown_alike_in_a_file_of_its_own_and_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mad" / "quick"
    runs = {f"lr0.{n}": mad_run("compression", "attention", n, n / 4) for n in range(4)}
    queue(folder, **runs)
    (folder / "timings").mkdir()
    times = {"cpu_seconds": 1.5, "commit": "c", "hardware": {"processor": "p", "threads": 1, "torch": "t"}}
    (folder / "timings" / "lr0.1.json").write_text(json.dumps(times))
    (folder / "timings" / "lr0.3.json").write_text(json.dumps(times))

    def shown():
        section = next(s for s in build_sections([tmp_path]) if s.anchor == "mad")
        assert check_page(render([section], [tmp_path]), tmp_path) == 7
        cells = [cell.text for row in section.tables[0].rows for cell in row]
        return cells, [(name, cell.text) for name, cell in section.provenance[1:]], section

    before = shown()[:2]
    assert before[1][-1] == ("CPU seconds", "3")
    file = folder / "results" / "lr0.2.json"
    kept = file.read_text()
    file.unlink()
    fold(folder)
    file.write_text(kept)
    *after, section = shown()
    assert tuple(after) == before
    sources = section.tables[0].rows[0][1].sources
    assert [source.partition("#")[0] for source in sources] == [
        f"mad/quick/{name}" for name in ("runs.jsonl", "runs.jsonl", "results/lr0.2.json", "runs.jsonl")
    ]
    assert sources[3] == "mad/quick/runs.jsonl#/lr0.3/result/score"
    assert section.provenance[0][1].text == "4 in mad/quick/runs.jsonl, mad/quick/results"


def test_mad_stands_beside_what_the_papers_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mad" / "quick"
    queue(folder, a=mad_run("compression", "attention", 0, 0.5))
    pair = {
        "task": "compression",
        "first": "attention",
        "second": "fem_gla",
        "published": 8.75,
        "ours": -1.25,
    }
    published = [{"source": "A 2026", "label": "FEM", "tasks": [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]}]
    content = {"published": published, "comparisons": [pair | {"verdict": "differs"}]}
    (folder / "report.json").write_text(json.dumps(content))
    section = next(s for s in build_sections([tmp_path]) if s.anchor == "mad")
    _, theirs, differences = section.tables
    assert [cell.text for cell in theirs.rows[0]] == ["FEM, A 2026", "1.5", "2.5", "3.5", "4.5", "5.5", "6.5"]
    shown = ["attention to fem gla, compression", "+8.8", "-1.2", "differs"]
    assert [cell.text for cell in differences.rows[0]] == shown
    assert check_page(render([section], [tmp_path]), tmp_path) >= 8


def test_forecasts_and_images_are_read_from_their_queues(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def forecast(horizon, seed, mse):
        settings = {"data": {"name": "weather"}, "model": "dlinear", "horizon": horizon, "seed": seed}
        return {"settings": settings, "result": {"test": {"mse": mse, "mae": mse / 2}}}

    def image(model, accuracy):
        settings = {"data": {"name": "digits"}, "model": model, "seed": 0}
        return {
            "settings": settings,
            "result": {"parameters": 9, "test": {"accuracy": accuracy, "loss": 0.5}},
        }

    queue(
        tmp_path / "forecast" / "run", a=forecast(96, 0, 0.5), b=forecast(96, 1, 1.5), c=forecast(192, 0, 2.0)
    )
    queue(tmp_path / "vision" / "run", a=image("attention", 0.5), b=image("fem", 0.75))
    sections = {s.anchor: s for s in build_sections([tmp_path])}
    mse, mae = sections["forecasting"].tables
    assert [cell.text for cell in mse.rows[0]] == ["dlinear", "1.000 ± 0.707", "2.000"]
    assert mae.rows[0][2].text == "1.000"
    assert sections["forecasting"].missing == ("weather: 3 of 72 runs", "traffic: 0 of 72 runs")
    assert sections["vision"].missing == ("digits: 2 of 6 runs", "fashion-mnist: 0 of 6 runs")
    assert [[c.text for c in row] for row in sections["vision"].tables[0].rows] == [
        ["attention", "9", "50.00%", "0.5000"],
        ["fem", "9", "75.00%", "0.5000"],
    ]
    assert check_page(render(list(sections.values()), [tmp_path]), tmp_path) > 8


def test_letters_begin_without_a_plan_and_end_with_the_law():
    section = next(s for s in build_sections([ROOT / "docs" / "experiments"]) if s.anchor == "letters")
    names = [row[0].text for row in section.tables[0].rows]
    assert names == ["no plan", "1/64", "1/8", "1", "8", "the data distribution itself"]
    assert [cell.text for cell in section.tables[0].rows[-1][1:]] == ["0.2923", "0.2923", "", "12.0", "-0.00"]


def test_recall_takes_the_larger_of_two_measurements_of_a_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(n_patterns, n_trials, margin, accuracy, kind="noise"):
        sizes = {"d_model": 8, "n_patterns": n_patterns, "n_trials": n_trials,
                 "corruption": {"kind": kind, "level": 1.0}}  # fmt: skip
        settings = {"part": "patterns", **sizes, "seed": 0}
        return {
            "settings": settings,
            "result": {**sizes, "margin": margin, "accuracy": accuracy, "nearest": 1.0},
        }

    queue(
        tmp_path / "recall", a=run(4, 10, 4.5, 0.5), b=run(4, 20, 4.5, 0.75), c=run(8, 10, 2.5, 0.25),
        d=run(8, 10, 2.5, 0.1, kind="mask"), e={"settings": {"part": "values", "seed": 0}, "result": {}},
    )  # fmt: skip
    section = next(s for s in build_sections([tmp_path]) if s.anchor == "recall")
    (table,) = section.tables
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["D = 8, K = 4", "4.50", "0.750"],
        ["D = 8, K = 8", "2.50", "0.250"],
    ]
    assert "recall/results/c.json" in table.rows[1][2].sources[0]
    assert check_page(render([section], [tmp_path]), tmp_path) == 5


def test_nodes_know_where_they_lie(tmp_path):
    (tmp_path / "a file.json").write_text(
        json.dumps({"no memory": [{"a/b": 1.5}, {"a/b": None}], "x": math.nan})
    )
    node = read_node(tmp_path / "a file.json")
    inner = node["no memory"][0]["a/b"]
    assert inner.source.endswith("a%20file.json#/no%20memory/0/a~1b")
    assert value_at(inner.source, Path("/")) == 1.5
    assert [child.value for child in node["no memory"]] == [{"a/b": 1.5}, {"a/b": None}]
    assert inner.name == "a/b"
    assert number([child["a/b"] for child in node["no memory"]], ".2f").text == "1.50"
    assert number(node["x"], ".2f").text == "" == number([], ".2f").text
    with pytest.raises(ValueError, match="no 'beta' there"):
        node["no memory"][0]["beta"]
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_node(tmp_path / "bad.json")


def test_rules_of_cells():
    nodes = [Node("f", f"/{i}", value) for i, value in enumerate((1, 3, 1))]
    assert number(nodes, ".1f").text == "1.7 ± 1.2"
    assert number(nodes, "d", rule="set").text == "1, 3"
    assert number(nodes, ",d", rule="sum").text == "5"
    assert number(nodes[0], "d", prefix="≤ ").text == "≤ 1"
    with pytest.raises(ValueError, match="one for a value"):
        number(nodes, "d", rule="value")
    groups = grouped(nodes, lambda node: str(node.value))
    assert list(ordered(groups, ["3", "9"])) == ["3", "1"] and len(groups["1"]) == 2


def test_folders_are_found_from_above_and_by_their_own_name(tmp_path):
    (tmp_path / "selection" / "results").mkdir(parents=True)
    assert locate([tmp_path], "elsewhere", "selection") == tmp_path / "selection"
    assert locate([tmp_path / "selection"], "selection/results") == tmp_path / "selection" / "results"
    assert locate([tmp_path], "nothing") is None
    assert locate_queue([tmp_path], "selection") is None
    (tmp_path / "selection" / "results" / "a.json").write_text("{}")
    assert locate_queue([tmp_path], "nothing", "selection") == tmp_path / "selection"
    (tmp_path / "selection" / "results" / "a.json").rename(tmp_path / "selection" / "runs.jsonl")
    assert locate_queue([tmp_path], "nothing", "selection") == tmp_path / "selection"


def test_words_are_escaped():
    table = Table("<b>", ("<i>",), ((number(Node("f<x>", "/a", 1), "d"),),))
    page = render([Section("a", "<script>", "x & y", "c", tables=(table,))], [Path("x")])
    assert "<b>" not in page and "&lt;script&gt;" in page and "x &amp; y" in page


def test_charts_take_the_colour_of_the_text_and_the_same_bytes_come_again():
    charts = [
        lambda: line_chart([Curve("a", [1, 10], [1, 2]), Curve("b", [1], [2], "--", 0)], x="x", y="y"),
        lambda: dot_chart([("one", [1.0, 2.0]), ("two", [3.0])], x="score"),
        lambda: heat_charts([("m", [[0.0, 1.0], [1.0, 0.0]])], x="x", y="y", marks=[[1, 0]]),
    ]
    for chart in charts:
        svg = chart()
        assert svg == chart()
        assert svg.startswith("<svg") and "currentColor" in svg and "<style" not in svg
        assert not re.search(r"<svg[^>]* (width|height)=", svg)
    assert "one" in charts[1]()
