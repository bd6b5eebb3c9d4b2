"""``report.html``: its facts, headings, figures, links, and form as a page; the list of runs of a study."""

from __future__ import annotations

import argparse
import datetime
import html.parser
import json
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
import torch
from test_cli import PROBLEMS

import curvop
from curvop import HessianLinearOperator
from curvop.cli.html_report import _STYLE
from curvop.cli.main import main
from curvop.cli.spectrum_results import _figures
from curvop.operators.summaries import with_error
from curvop.problems import load
from curvop.spectrum import BlockStudy, EigenResult, SpectralDensity, density, frobenius_norm, trace
from curvop.spectrum.plots import plot_blocks

LOADERS = """
from torch.utils.data import DataLoader, TensorDataset

def loaded():
    problem = network(torch.float32)
    X, y = (torch.cat(parts) for parts in zip(*problem["data"]))
    return problem | dict(data=DataLoader(TensorDataset(X, y), batch_size=6, drop_last=True))

def unsized():
    problem = network()
    def loss(prediction, y):
        return torch.nn.functional.mse_loss(prediction[: len(y)], y)
    return problem | dict(loss_function=loss, data=[(torch.ones(4, 3).double(), torch.ones(3, 2).double())])
"""


class Page(html.parser.HTMLParser):
    """A page, parsed strictly: each element is closed, and nested properly."""

    VOID = ("img", "meta")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open[-1:]:
            self.texts.setdefault(tag, []).append(data)
        if "th" in self.open or "td" in self.open:
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of all elements of a kind."""
        return [attrs for name, attrs in self.tags if name == tag]

    def __getitem__(self, name: str) -> str:
        """Return the value of a fact."""
        [value] = {row[1] for row in self.rows if row[0] == name}
        return value


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "problems.py").write_text(PROBLEMS + LOADERS)
    return f"{tmp_path / 'problems.py'}:small"


def study(out: Path, *argv: object) -> tuple[dict[str, Any], Page]:
    """Run ``curvop spectrum``. Return the content of ``spectrum.json``, and the report."""
    assert main(["spectrum", *map(str, argv), "--out", str(out)]) in (0, 1, 3)
    return json.loads((out / "spectrum.json").read_text()), Page((out / "report.html").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Page]:
    """A finished study with blocks, some of which are estimated."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "problems.py").write_text(PROBLEMS)
    argv = (f"{folder / 'problems.py'}:medium", "--k", 3, "--blocks", "--probes", 2, "--steps", 8)
    return folder / "a study", *study(folder / "a study", *argv)


class TestProvenance:
    def test_the_facts_are_those_of_the_run(self, spec, tmp_path) -> None:
        before = datetime.datetime.now().astimezone().replace(microsecond=0)
        out = tmp_path / "a study"
        argv = [spec, "--k", "1", "--dtype", "float32", "--out", str(out)]
        assert main(["spectrum", *argv]) == 0
        found = json.loads((out / "spectrum.json").read_text())
        facts, page = found["provenance"], Page((out / "report.html").read_text())
        date = datetime.datetime.fromisoformat(facts["date"])
        assert before <= date <= datetime.datetime.now().astimezone()
        assert page["date"] == f"{date:%Y-%m-%d %H:%M:%S} UTC{facts['date'][19:]}"
        assert shlex.split(facts["command"]) == ["curvop", "spectrum", *argv]
        assert f"'{out}'" in facts["command"]  # the name has a space
        assert page["command"] == facts["command"]
        assert facts["versions"] == {
            "curvop": curvop.__version__,
            "torch": torch.__version__,
            "scipy": scipy.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        }
        for name, key in {"curvop": "curvop", "PyTorch": "torch", "SciPy": "scipy", "NumPy": "numpy"}.items():
            assert f"{name} {facts['versions'][key]}" in page["versions"]
        assert f"Python {platform.python_version()}" in page["versions"]
        assert facts["device"].startswith("cpu (")
        assert page["device"] == facts["device"]
        assert (facts["model"], facts["loss_function"]) == (page["model"], page["loss function"])
        assert facts["model"] == "Sequential"
        assert (facts["model_dtype"], facts["dtype"]) == ("float64", "float32")
        assert page["precision"].startswith("parameters float64, vectors float32")
        assert page["parameters"] == "26"
        assert (facts["batches"], facts["examples"]) == (2, 20)
        assert page["data"] == "20 examples in 2 batches"
        assert page["random seed"] == "0 (trace: 1, norm: 2)"

    def test_the_seeds_are_those_that_were_used(self, done) -> None:
        folder, found, _ = done
        seeds = found["provenance"]["seeds"]
        H = HessianLinearOperator(**load(f"{folder.parent / 'problems.py'}:medium"))
        assert found["trace"]["value"] == pytest.approx(trace(H, 60, rng=seeds["trace"], progress=False).value)
        norm = frobenius_norm(H, 60, rng=seeds["norm"], progress=False)
        assert found["frobenius_norm"]["value"] == pytest.approx(norm.value)
        spectrum = density(H, 2, 8, rng=seeds["density"], progress=False)
        np.testing.assert_allclose(found["density"]["range"], spectrum.range)

    def test_examples_of_a_loader_are_counted_and_unknown_numbers_are_not_guessed(self, spec, tmp_path) -> None:
        found, page = study(tmp_path / "loaded", spec.replace("small", "loaded"), "--k", 1)
        assert (found["provenance"]["batches"], found["provenance"]["examples"]) == (3, 18)
        assert found["provenance"]["model_dtype"] == "float32"
        assert page["precision"].startswith("parameters float32, vectors float64")
        found, page = study(tmp_path / "unsized", spec.replace("small", "unsized"), "--k", 1)
        assert (found["provenance"]["batches"], found["provenance"]["examples"]) == (1, None)
        assert page["data"] == "an unknown number of examples in 1 batch"

    def test_without_a_folder_the_json_output_has_them_too(self, spec, capsys) -> None:
        assert main(["spectrum", spec, "--k", "1", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["provenance"]["products"] == facts["products"] > 0
        assert [run["end"] for run in facts["provenance"]["runs"]] == ["finished"]

    @pytest.mark.parametrize("matrix", ["kfac", "ggn"])
    def test_other_matrices_have_them(self, spec, tmp_path, matrix) -> None:
        found, page = study(tmp_path / "study", spec, "--k", 1, "--matrix", matrix)
        assert found["provenance"]["examples"] == 20
        assert page["model"] == "Sequential"

    def test_the_keys_of_the_json_output_keep_their_names(self, done) -> None:
        _, found, _ = done
        old = {"format", "problem", "title", "rows", "parameters", "names", "undone", "notes", "products", "seconds"}
        old |= {"journal_bytes", "loss", "gradient_norm", "ok", "trace", "frobenius_norm", "density", "ends", "blocks"}
        assert set(found) == old | {"provenance"}


NO_TIME = dict(date=None, command=None, versions={}, device=None, seconds=None)


class TestRuns:
    def test_products_and_time_add_up(self, spec, tmp_path, capsys) -> None:
        out = tmp_path / "study"
        first, page = study(out, spec, "--k", 1)
        assert not [row for row in page.rows if row[0] == "cost of all runs"]
        second, page = study(out, spec, "--k", 1, "--blocks", "--resume")
        assert 0 < second["products"] < first["products"]
        facts = second["provenance"]
        assert [run["products"] for run in facts["runs"]] == [first["products"], second["products"]]
        assert facts["products"] == first["products"] + second["products"]
        assert facts["seconds"] == pytest.approx(first["seconds"] + second["seconds"], abs=0.5)
        assert facts["complete"]
        assert facts["runs"][0]["command"] == first["provenance"]["command"]
        assert "--resume" not in facts["runs"][0]["command"]
        assert "--resume" in facts["command"]
        assert page["cost of all runs"].startswith(f"{facts['products']:,} products in ")
        assert page["cost of all runs"].endswith(" s over 2 runs")
        assert page["cost of all runs"] in capsys.readouterr().out
        runs = [row for row in page.rows if row[0] in ("1", "2") and "finished" in row]
        assert [row[2] for row in runs] == [f"{first['products']:,}", f"{second['products']:,}"]

    def test_a_run_that_failed_counts(self, spec, tmp_path, monkeypatch) -> None:
        out = tmp_path / "study"

        def fail(*args, **options) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("curvop.cli.spectrum_study.frobenius_norm", fail)
        assert main(["spectrum", spec, "--k", "1", "--out", str(out)]) == 130
        monkeypatch.undo()
        interrupted = json.loads((out / "spectrum.json").read_text())
        found, _ = study(out, spec, "--k", 1, "--resume")
        facts = found["provenance"]
        assert [run["end"] for run in facts["runs"]] == ["interrupted", "finished"]
        assert facts["products"] == interrupted["products"] + found["products"]
        whole, _ = study(tmp_path / "whole", spec, "--k", 1)
        assert facts["products"] == whole["products"]
        assert facts["complete"]

    def test_a_run_that_was_killed_counts_with_what_it_left_on_disk(self, spec, tmp_path) -> None:
        """Its record is that of its start. Its products are in the journal, which was last written 40 s later."""
        out = tmp_path / "study"
        first, _ = study(out, spec, "--k", 1)
        [record] = json.loads((out / "runs.json").read_text())
        (out / "runs.json").write_text(json.dumps([record | {"end": "running", "products": 0, "seconds": 2.0}]))
        now = (out / "runs.json").stat().st_mtime
        for file in out.rglob("*"):
            os.utime(file, (now, now))
        os.utime(out / "journal" / "products.records", (now + 40, now + 40))
        (out / "notes.txt").write_text("written days later")
        os.utime(out / "notes.txt", (now + 4e5, now + 4e5))
        found, page = study(out, spec, "--k", 1, "--resume")
        facts = found["provenance"]
        assert [run["end"] for run in facts["runs"]] == ["killed", "finished"]
        assert facts["seconds"] == pytest.approx(42 + found["seconds"], abs=0.5)
        assert 26 < facts["products"] <= first["products"]
        assert not facts["complete"]
        assert page["cost"].startswith(f"at least {facts['products']} products in 4")
        again, _ = study(out, spec, "--k", 1, "--resume")
        assert [run["end"] for run in again["provenance"]["runs"]] == ["killed", "finished", "finished"]

    def test_a_copy_of_a_folder_takes_no_time(self, spec, tmp_path) -> None:
        out = tmp_path / "study"
        study(out, spec, "--k", 1)
        [record] = json.loads((out / "runs.json").read_text())
        (out / "runs.json").write_text(json.dumps([record | {"end": "running", "seconds": 2.0}]))
        for file in out.rglob("*"):
            os.utime(file, (2e9, 2e9))
        found, _ = study(out, spec, "--k", 1, "--resume")
        assert found["provenance"]["runs"][0]["seconds"] == 2.0

    @pytest.mark.parametrize("content", [None, "no JSON", '[{"unknown": 1}]', json.dumps([NO_TIME])])
    def test_a_folder_of_an_earlier_version_is_resumed(self, spec, tmp_path, content) -> None:
        out = tmp_path / "study"
        first, _ = study(out, spec, "--k", 1)
        (out / "runs.json").unlink()
        if content is not None:
            (out / "runs.json").write_text(content)
        found, page = study(out, spec, "--k", 1, "--resume")
        facts = found["provenance"]
        assert facts["products"] == first["products"]
        assert facts["runs"][0]["date"] is None
        assert not facts["complete"]
        assert page["cost"].startswith("at least ")
        assert "unknown" in next(row for row in page.rows if row[0] == "1" and "finished" in row)

    def test_a_refused_run_leaves_the_list_alone(self, spec, tmp_path) -> None:
        out = tmp_path / "study"
        study(out, spec, "--k", 1)
        before = (out / "runs.json").read_bytes()
        assert main(["spectrum", spec.replace("small", "medium"), "--k", "1", "--out", str(out), "--resume"]) == 2
        assert (out / "runs.json").read_bytes() == before


class TestFigures:
    def test_headings_are_words(self, done) -> None:
        _, _, page = done
        assert page.texts["h1"][0].startswith("Hessian of ")
        assert page.texts["h2"] == [
            "Density",
            "Largest eigenvalues",
            "Smallest eigenvalues",
            "Layer by layer",
            "Files",
            "How this was computed",
        ]
        assert "(LA)" not in page.text

    def test_unfinished_steps_are_words(self, spec, tmp_path) -> None:
        found, page = study(tmp_path / "study", spec.replace("small", "medium"), "--deadline", "0.001s")
        assert "eigenvalues LA: not done by the deadline" in found["undone"]
        assert "largest eigenvalues: not done by the deadline" in page.texts["p"]
        assert not re.search(r"eigenvalues (LA|SA)\b", page.text)

    def test_the_report_says_at_its_top_that_an_eigenvalue_is_not_certified(self, spec, tmp_path, capsys) -> None:
        argv = (spec.replace("small", "medium"), "--k", 12, "--maxiter", 1, "--steps", 2, "--probes", 1)
        found, page = study(tmp_path / "study", *argv)
        assert (found["ok"], found["undone"]) == (False, [])
        state = "all steps are complete, but not all eigenvalues are certified"
        assert state in page.texts["p"][:2]
        assert capsys.readouterr().out.splitlines()[-1] == state

    def test_estimates_are_rounded_to_their_errors(self, done) -> None:
        _, found, page = done
        for name, key in {"trace": "trace", "Frobenius norm": "frobenius_norm"}.items():
            text = with_error(found[key]["value"], found[key]["error"])
            assert "+-" in text
            assert page[name] == text.replace("+-", "±")

    def test_eigenvalues_are_rounded_to_their_error_bounds(self, spec, tmp_path) -> None:
        """In single precision, the errors are visible among ten digits."""
        found, page = study(tmp_path / "study", spec.replace("small", "single"), "--k", 3)
        shown = [row for row in page.rows if len(row) == 4 and row[0].isdecimal() and "±" in row[1]]
        values = np.concatenate([end["values"] for end in found["ends"]])
        bounds = np.concatenate([end["bounds"] for end in found["ends"]])
        visible = bounds > 1e-8 * np.abs(values)
        assert len(shown) == visible.sum() > 0
        for (_, text, bound, _), value, error in zip(shown, values[visible], bounds[visible], strict=True):
            number = float(re.sub(r"\((\S+) .*\)(e.*)", r"\1\2", text).split()[0])
            assert abs(number - value) <= 0.51 * error
            assert bound == f"{error:.1e}"

    def test_the_table_of_blocks_is_visible_and_below_its_picture(self, done) -> None:
        folder, _, page = done
        assert "<details" not in page.text
        rows = [row for row in page.rows if row[0] in BlockStudy.load(folder / "blocks.npz").names]
        assert rows == [
            [row[0], *(cell.replace("+-", "±") for cell in row[1:])]
            for row in BlockStudy.load(folder / "blocks.npz").table[1:]
        ]
        assert page.text.index('class="scroll wide"') < page.text.index('class="blocks"')

    def test_the_axis_of_the_blocks_names_its_scale(self, done) -> None:
        folder, _, _ = done
        axes = plot_blocks(BlockStudy.load(folder / "blocks.npz")).axes
        [scaled] = [ax for ax in axes if ax.get_xscale() == "symlog"]
        threshold = scaled.xaxis.get_transform().linthresh
        found = re.fullmatch(r"eigenvalue \(symmetric log scale, linear below (\S+)\)", scaled.get_xlabel())
        assert float(found[1]) == pytest.approx(threshold, rel=0.5)

    def test_the_axis_of_the_density_names_its_scale(self, done) -> None:
        results = argparse.Namespace(density=SpectralDensity.load(done[0] / "density.npz"), ends=[])
        [ax] = _figures(results, {"density"})["density"].axes
        assert ax.get_yscale() == "log"
        assert ax.get_ylabel() == "density (log scale)"

    def test_the_picture_of_the_density_marks_eigenvalues_that_were_computed_after_it(self, done) -> None:
        folder, _, _ = done
        ends = [EigenResult.load(folder / f"eigenpairs_{which}.npz") for which in ("LA", "SA")]
        results = argparse.Namespace(density=SpectralDensity.load(folder / "density.npz"), ends=ends, blocks=None)
        [ax] = _figures(results, {"eigenpairs_SA"})["density"].axes
        marked = [line.get_xdata() for line in ax.lines if line.get_marker() == "|"]
        np.testing.assert_array_equal(np.concatenate(marked), np.concatenate([end.values for end in ends]))
        assert not _figures(results, {"blocks"})


class TestFiles:
    def test_each_link_leads_to_a_file_and_its_lines_load_it(self, done, monkeypatch) -> None:
        folder, found, page = done
        links = [attrs["href"] for attrs in page.all("a")]
        own = {path.name for path in folder.iterdir() if path.is_file()} - {"report.html"}
        assert set(links) == own
        loaded: dict[str, Any] = {}
        lines = [row[2] for row in page.rows if row[0] in links and row[2]]
        assert len(lines) == len([name for name in own if not name.endswith((".svg", ".png"))])
        monkeypatch.chdir(folder)
        for text in lines:
            assert len(text.splitlines()) == 2
            exec(text, loaded)
        assert isinstance(loaded["largest"], EigenResult)
        assert loaded["largest"].values.tolist() == found["ends"][0]["values"]
        assert loaded["smallest"].values.tolist() == found["ends"][1]["values"]
        assert loaded["density"].range == tuple(found["density"]["range"])
        assert loaded["blocks"].names == list(found["blocks"])
        assert loaded["results"] == found
        assert loaded["runs"] == found["provenance"]["runs"]

    def test_files_that_do_not_exist_are_not_listed(self, spec, tmp_path, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        _, page = study(tmp_path / "study", spec, "--k", 1, "--matrix", "ggn")
        links = {attrs["href"] for attrs in page.all("a")}
        assert links == {"spectrum.json", "eigenpairs_LA.npz", "density.npz", "runs.json"}
        assert page.all("img") == []


class TestPage:
    def test_it_needs_neither_scripts_nor_other_files(self, done) -> None:
        _, _, page = done
        assert page.all("script") == page.all("link") == page.all("iframe") == []
        assert all(attrs["src"].startswith("data:image/png;base64,") for attrs in page.all("img"))
        handlers = {name for _, attrs in page.tags for name in attrs if name.startswith("on")}
        assert handlers == set()
        assert not re.search(r"https?:|url\(|@import", page.text)

    def test_a_screen_reader_finds_its_way(self, done) -> None:
        _, _, page = done
        assert page.all("html") == [{"lang": "en"}]
        assert [len(attrs["alt"]) > 30 for attrs in page.all("img")] == [True, True]
        assert all(attrs["scope"] in ("row", "col") for attrs in page.all("th"))
        assert [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)] == ["h1"] + ["h2"] * 6
        assert len(page.all("main")) == 1
        scrolling = [attrs for attrs in page.all("div") if attrs.get("role") == "region"]
        assert all(attrs["aria-label"] and attrs["tabindex"] == "0" for attrs in scrolling)

    def test_wide_tables_scroll_and_the_width_is_that_of_the_device(self, done) -> None:
        _, _, page = done
        assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
        tables = re.findall(r'(<div class="scroll"[^>]*>\n)?<table(?: class="(\w+)")?', page.text)
        assert len(tables) == 6
        assert all(container or kind == "facts" for container, kind in tables)
        assert ".scroll { overflow-x: auto" in page.text
        assert "@media print" in page.text

    @pytest.mark.parametrize("mode", ["light", "dark"])
    def test_text_has_enough_contrast(self, mode: str) -> None:
        """The Web Content Accessibility Guidelines ask for a ratio of 4.5."""
        blocks = re.findall(r":root \{([^}]*)\}", _STYLE)
        text = blocks[0] if mode == "light" else _STYLE.partition("(prefers-color-scheme: dark)")[2]
        colors = dict(re.findall(r"--(\w+): (#\w+)", text.partition("}")[0]))

        def luminance(color: str) -> float:
            digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
            parts = np.array([int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)])
            linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
            return float(linear @ [0.2126, 0.7152, 0.0722])

        assert (luminance(colors["page"]) > 0.5) == (mode == "light")
        for name in ("text", "soft", "good", "bad", "link"):
            for ground in ("page", "code") if name == "text" else ("page",):
                pair = sorted((luminance(colors[name]), luminance(colors[ground])))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, name

    def test_odd_names_stay_text(self, tmp_path) -> None:
        file = tmp_path / "<script>alert('1')<_script> & \"x\".py"
        file.write_text(PROBLEMS)
        found, page = study(tmp_path / "study", f"{file}:small", "--k", 1)
        assert page.all("script") == []
        assert "".join(page.texts["h1"]) == f"Hessian of {file}:small"
        assert shlex.split(page["command"])[2] == found["problem"] == f"{file}:small"
