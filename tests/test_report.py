"""Reports of studies and runs, from files that a test writes: complete and self-contained."""

import csv
import html.parser
import json
import re

import pytest
from test_plots import history, records

from kdgqa_jax import cli, config, report
from kdgqa_jax.errors import UserError
from kdgqa_jax.records import Results
from kdgqa_jax.report import recipe, tables

LOADING = {"src", "href", "srcset", "poster", "data", "action", "background", "xlink:href"}
UNCLOSED = {"meta", "img", "br", "link", "hr"}


class Page(html.parser.HTMLParser):
    """What a page would load, the texts of its cells, and whether its elements are closed."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.images, self.words, self.open, self.tags = [], [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [v for k, v in attrs if k in LOADING and not v.startswith("data:")]
        if tag == "img":
            found = dict(attrs)
            assert found["alt"] and found["src"].startswith("data:image/svg+xml;base64,")
            self.images.append(found)
        if tag not in UNCLOSED:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def check_self_contained(text):
    page = Page(text)
    assert page.loads == [] and not page.tags & {"script", "link", "iframe", "object", "embed"}
    assert "http" not in re.sub(r"data:[^\"]*", "", text) and "@import" not in text
    assert not re.search(r"url\((?!data:)", re.sub(r"data:[^\"]*", "", text))
    return page


def study_records(config_json):
    found = []
    for r in records(("gqa", "kdgqa"), ("converted", "uptrained", "finetuned")):
        found.append(
            {
                "num_heads": 8,
                "num_kv_heads": 4,
                **r,
                "variant": r["entry"],
                "folder": f"seed{r['seed']}/{r['entry']}/{r['stage']}",
                "rule": "mean",
                "steps": 20,
                "test_images": 360,
                "num_kv_params": 16640,
                "allocation": [[0, 2, 2, 4]] * 3,
                "idle_kv_heads": 3,
                "config": config_json[{"finetuned": "finetune"}.get(r["stage"], "uptrain")],
                "versions": {"jax": "1.2.3"},
                "device": "1 x <cpu> & more",
            }
        )
    return found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A study: three seeds of two entries, one of which has failed with one seed."""
    place = tmp_path_factory.mktemp("study")
    settings = config.study_config()
    settings.variants = ("gqa", "kdgqa")
    settings = json.loads(json.dumps(settings.to_dict()))
    (place / "config.json").write_text(json.dumps(settings))
    found = study_records(settings)
    for r in found:
        if r["stage"] in ("uptrained", "finetuned"):
            folder = place / r["folder"]
            folder.mkdir(parents=True)
            lines = [json.dumps(x) + "\n" for x in history()]
            (folder / "metrics.jsonl").write_text("".join(lines))
    failed = {"entry": "kdgqa", "stage": "finetuned", "seed": 9, "failed": "no <memory> left"}
    (place / "report").mkdir()
    (place / "report" / "results.json").write_text(json.dumps([*found, failed]))
    assert cli.main(["report", "--workdir", str(place)]) == 0
    return place


def test_the_page_of_a_study_says_everything_and_loads_nothing(workdir):
    page = check_self_contained((workdir / "report" / "report.html").read_text("utf-8"))
    assert "kdgqa, seed 9, finetuned: no <memory> left" in page.text
    assert "1 x <cpu> & more" in page.text and "jax 1.2.3" in page.text
    assert "kdgqa is above gqa" in page.text
    assert "kdgqa study --config config.py" in page.text
    assert len(page.images) == 4  # accuracy, allocation, idle heads, key norms of kdgqa
    assert "prefers-color-scheme: dark" in (workdir / "report" / "report.html").read_text("utf-8")


def test_results_md_has_a_row_for_each_entry_and_a_line_for_what_failed(workdir):
    lines = (workdir / "report" / "results.md").read_text("utf-8").splitlines()
    rows = [line.split(" | ")[0] for line in lines if line.startswith(("| kdgqa |", "| gqa |"))]
    assert rows[:2] == ["| gqa", "| kdgqa"]
    assert "- failed: kdgqa, seed 9, finetuned: no <memory> left" in lines
    assert lines[2].startswith("`kdgqa study --config config.py --workdir AGAIN` makes it")


def test_tables_have_mean_deviation_and_interval(workdir):
    with (workdir / "report" / "results.csv").open() as file:
        rows = {(r["entry"], r["stage"]): r for r in csv.DictReader(file)}
    found = rows["kdgqa", "uptrained"]
    assert len(rows) == 6 and (found["seeds"], found["mean"]) == ("3", "74.0")
    assert float(found["deviation"]) == 1.0
    assert float(found["interval"]) == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert (found["lowest"], found["highest"]) == ("73.0", "75.0")
    latex = (workdir / "report" / "results.tex").read_text("utf-8")
    assert r"kdgqa & 8 & 4 & 16,640 & 64.00 $\pm$ 2.48" in latex
    assert latex.count(r"\\") == 3 and r"\begin{tabular}{lrrrrrrr}" in latex
    assert "idle" in latex and "comparisons.csv" in {p.name for p in (workdir / "report").iterdir()}


def test_a_table_in_latex_and_markdown_escapes_what_means_something():
    table = tables.Table(["a_b", "5 %"], [["x|y", "1 & 2 ± 3^~\\{}"]])
    assert table.markdown()[2] == r"| x\|y | 1 & 2 ± 3^~\{} |"
    assert r"a\_b & 5 \%" in table.latex()
    assert r"\& 2 $\pm$ 3\textasciicircum{}\textasciitilde{}\textbackslash{}\{\}" in table.latex()


def test_the_config_file_of_a_report_gives_the_config_again(workdir):
    again = config.load_config(str(workdir / "report" / "config.py"))
    config.check_fields(again, config.study_config())
    assert json.loads(json.dumps(again.to_dict())) == json.loads(
        (workdir / "config.json").read_text()
    )
    settings = config.train_config().to_dict()
    settings |= {"init": "a 'quoted' \"model\"", "__import__('os')": 1}
    text = recipe.config_file(settings)
    assert "__import__" not in text
    namespace = {}
    exec(text, namespace)
    assert namespace["get_config"]().init == settings["init"]


def test_an_unknown_baseline_is_refused(workdir, capsys):
    assert cli.main(["report", "--workdir", str(workdir), "--baselines", "gqq"]) == 1
    assert "unknown baseline 'gqq': did you mean 'gqa'?" in capsys.readouterr().err


def test_the_page_of_a_run(tmp_path):
    settings = config.train_config().to_dict()
    settings["model"]["attention"] = "kdgqa"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    lines = [*history(), {"step": 100, "epoch": 2.0, "split": "test", "top1": 71.5, "loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    result = {"steps": 100, "seconds": 3.0, "top1": 71.5, "best_top1": 72.0, "loss": 1.0}
    result |= {"skipped_updates": 0, "allocation": [[0, 8]]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    folder = report.build(tmp_path)
    page = check_self_contained((folder / "report.html").read_text("utf-8"))
    assert "71.50 % (best 72.00 %)" in page.text and "0 8" in page.text
    assert len(page.images) == 3 and "kdgqa train --config config.py" in page.text
    (tmp_path / "result.json").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    page = Page((report.build(tmp_path) / "report.html").read_text("utf-8"))
    assert "0: the run has not ended" in page.text and page.images == []
    with pytest.raises(UserError, match="baselines are of a study"):
        report.build(tmp_path, ["gqa"])


def test_nothing_to_report_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds neither a study nor a training run"):
        report.build(tmp_path)
    settings = config.study_config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"has not ended .* the command that began it resumes"):
        report.build(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "report").mkdir()
    failed = [{"entry": "gqa", "stage": "converted", "seed": 1, "failed": "no memory"}]
    (tmp_path / "report" / "results.json").write_text(json.dumps(failed))
    with pytest.raises(UserError, match="every cell has failed"):
        report.build(tmp_path)
    for damaged in ({}, [1], [{"stage": "converted"}]):
        (tmp_path / "report" / "results.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="does not hold the records of a study"):
            report.build(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config of neither a study nor a run"):
        report.build(tmp_path)


def test_a_study_of_one_seed_says_what_that_is_worth():
    one = [r for r in study_records(config.study_config().to_dict()) if r["seed"] == 0]
    assert "One seed: at 95 % top-1 the test set alone leaves ± 2.3" in report.study._note(
        Results(one)
    )
    assert tables.overview(Results(one)).rows[0][4:7] == ["60.00", "70.00", "80.00"]
