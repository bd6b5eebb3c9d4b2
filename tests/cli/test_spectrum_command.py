"""``curvop spectrum``: its results, files, resumption and deadline."""

from __future__ import annotations

import argparse
import errno
import html.parser
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import PROBLEMS

from curvop import EKFACLinearOperator, KFACLinearOperator
from curvop.cli.main import main
from curvop.cli.spectrum_study import _Schedule
from curvop.examples.functorch import functorch_ggn, functorch_hessian
from curvop.problems import load
from curvop.spectrum import BlockStudy, EigenResult, SpectralDensity


@pytest.fixture
def spec(tmp_path: Path) -> str:
    file = tmp_path / "problems.py"
    file.write_text(PROBLEMS)
    return f"{file}:small"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def command(*argv: object) -> tuple[int, str, str]:
        code = main(["spectrum", *map(str, argv)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.mark.parametrize("block", [[], ["--block", "2.weight", "--block", "2.bias"]], ids=["whole", "block"])
@pytest.mark.parametrize(("matrix", "kind"), [("kfac", KFACLinearOperator), ("ekfac", EKFACLinearOperator)])
def test_approximations_are_compared_with_the_exact_matrix(run, spec, tmp_path, matrix, kind, block) -> None:
    out = tmp_path / "study"
    code, text, _ = run(spec, "--matrix", matrix, "--k", 3, "--out", out, "--json", *block)
    found, problem = json.loads(text), load(spec)
    K = kind(**problem)
    rows = slice(K.params_slices["2.weight"].start, None) if block else slice(None)
    dense, exact = (np.asarray(A)[rows, rows] for A in (K.to_dense(), functorch_ggn(**problem)))
    assert code == 0
    assert found["title"] == f"{matrix.upper()} of the Gauss-Newton matrix"
    np.testing.assert_allclose(found["ends"][0]["values"], np.linalg.eigvalsh(dense)[-3:], atol=1e-12)
    assert found["trace"] == {"value": pytest.approx(np.trace(dense), rel=1e-12), "error": 0}
    assert found["frobenius_norm"] == {"value": pytest.approx(np.linalg.norm(dense), rel=1e-12), "error": 0}
    density = SpectralDensity.load(out / "density.npz")
    np.testing.assert_allclose(density.atoms, np.linalg.eigvalsh(dense), atol=1e-12)
    vectors = EigenResult.load(out / "eigenpairs_LA.npz").vectors
    np.testing.assert_allclose(dense @ vectors, vectors * found["ends"][0]["values"], atol=1e-12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
    error = np.linalg.norm(dense - exact) / np.linalg.norm(exact)
    value, uncertainty = found["comparison"]["whole"]["error"]
    assert abs(value - error) <= max(4 * uncertainty, 1e-9)
    assert "Comparison with the exact matrix" in (out / "report.html").read_text()
    code, again, _ = run(spec, "--matrix", matrix, "--k", 3, "--out", out, "--resume", *block)
    assert code == 0
    assert "comparison with the exact matrix" in again


@pytest.mark.parametrize(("matrix", "kind"), [("kfac", KFACLinearOperator), ("ekfac", EKFACLinearOperator)])
def test_the_block_table_of_an_approximation_shows_the_error_of_each_block(run, spec, tmp_path, matrix, kind) -> None:
    out = tmp_path / "study"
    code, text, _ = run(spec, "--matrix", matrix, "--blocks", "--out", out)
    problem = load(spec)
    K, G = (np.asarray(A) for A in (kind(**problem).to_dense(), functorch_ggn(**problem)))
    found = json.loads((out / "spectrum.json").read_text())["blocks"]
    layers = {"0": slice(0, 16), "2": slice(16, 26)}
    assert code == 0
    assert list(found) == list(layers)
    table = text[text.index("block ") :].splitlines()
    assert table[0].endswith("relative error")
    for line, (name, rows) in zip(table[1:], layers.items(), strict=False):
        own, exact = K[rows, rows], G[rows, rows]
        error = found[name]["error"]
        expected = np.linalg.norm(own - exact) / np.linalg.norm(exact)
        assert abs(error["value"] - expected) <= max(4 * error["error"], 1e-9)
        assert float(line.partition("+-")[0].split()[-1]) == pytest.approx(error["value"], rel=0.02)
        assert found[name]["trace"] == pytest.approx(np.trace(own), rel=1e-12)
        assert found[name]["norm"] == pytest.approx(np.linalg.norm(own), rel=1e-12)
        assert found[name]["largest"] == pytest.approx(np.linalg.eigvalsh(own)[-1], rel=1e-12)
    assert ">relative error</th>" in (out / "report.html").read_text().partition("Comparison with")[0]


def test_a_block_without_closed_forms_is_estimated(run, spec) -> None:
    """A weight of a layer whose weight and bias form one eigenvalue-corrected block has no closed form."""
    code, out, _ = run(spec, "--matrix", "ekfac", "--block", "2.weight", "--k", 2, "--blocks", "--json")
    found = json.loads(out)
    values = np.linalg.eigvalsh(np.asarray(EKFACLinearOperator(**load(spec)).block(["2.weight"]).to_dense()))
    assert code == 0
    np.testing.assert_allclose(found["ends"][0]["values"], values[-2:], atol=1e-12)
    assert found["trace"]["value"] == pytest.approx(values.sum())
    assert "error" in found["blocks"]["2.weight"]


def test_the_figures_are_those_of_the_dense_matrix(run, spec) -> None:
    code, out, _ = run(spec, "--k", 3, "--blocks", "--json")
    found = json.loads(out)
    values = np.linalg.eigvalsh(functorch_hessian(**load(spec)).numpy())
    assert code == 0
    assert found["ok"]
    assert [end["which"] for end in found["ends"]] == ["LA", "SA"]
    np.testing.assert_allclose(found["ends"][0]["values"], values[-3:], atol=1e-12)
    np.testing.assert_allclose(found["ends"][1]["values"], values[:3], atol=1e-12)
    assert found["trace"]["value"] == pytest.approx(values.sum())
    assert found["frobenius_norm"]["value"] == pytest.approx(np.linalg.norm(values))
    np.testing.assert_allclose(found["density"]["range"], [values[0], values[-1]], rtol=1e-9)
    assert list(found["blocks"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    without = json.loads(run(spec, "--k", 3, "--json")[1])
    assert found["products"] == without["products"] + 2 * 26  # the blocks, and their columns for the norms


def test_another_matrix_and_a_block(run, spec) -> None:
    code, out, _ = run(spec, "--k", 2, "--matrix", "ggn", "--block", "2.weight", "--json")
    found = json.loads(out)
    problem = load(spec)
    problem["params"] = {"2.weight": problem["params"]["2.weight"]}
    values = np.linalg.eigvalsh(functorch_ggn(**problem).numpy())
    assert code == 0
    assert [end["which"] for end in found["ends"]] == ["LA"]
    np.testing.assert_allclose(found["ends"][0]["values"], values[-2:], atol=1e-12)
    assert (found["rows"], found["parameters"]) == (8, 26)


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.scripts = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs) -> None:
        self.scripts += tag == "script"
        self.sources += [value for name, value in attrs if name == "src"]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_files(run, spec, tmp_path) -> None:
    out = tmp_path / "study"
    code, text, _ = run(spec, "--k", 3, "--blocks", "--out", out)
    assert code == 0
    assert "Hessian of" in text
    assert SpectralDensity.load(out / "density.npz").size == 26
    assert BlockStudy.load(out / "blocks.npz").names[0] == "0.weight"
    assert EigenResult.load(out / "eigenpairs_LA.npz").ok
    parsed = json.loads((out / "spectrum.json").read_text())
    assert parsed["ok"]
    found = BlockStudy.load(out / "blocks.npz").densities[0]
    median = parsed["blocks"]["0.weight"]["density"]["quantiles"]["0.5"]
    assert found.range[0] < median["value"] == found.quantile(0.5).value < found.range[1]
    assert median["low"] <= median["value"] <= median["high"]
    shares = SpectralDensity.load(out / "density.npz").quantile([0.05, 0.25, 0.5, 0.75, 0.95])
    for name in ("value", "error", "low", "high"):
        assert [quantile[name] for quantile in parsed["density"]["quantiles"].values()] == getattr(
            shares, name
        ).tolist()
    for name in ("density", "blocks"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{name}.svg").read_text()
    page = Page((out / "report.html").read_text())
    assert not page.open
    assert not page.scripts
    assert len(page.sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not [file for file in out.iterdir() if file.name.startswith(".")]


def test_a_problem_that_wants_to_write_html(run, tmp_path) -> None:
    file = tmp_path / "<script>alert(1)<_script>.py"
    file.write_text(PROBLEMS)
    code, _, _ = run(f"{file}:small", "--k", 1, "--out", tmp_path / "study")
    assert code == 0
    assert not Page((tmp_path / "study" / "report.html").read_text()).scripts


NAMED = """
import torch
from torch import nn

def problem():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("$\\\\frac$", nn.Linear(3, 2))
    model.add_module("<b>", nn.Linear(2, 1))
    data = [(torch.randn(8, 3), torch.randn(8, 1))]
    return dict(model=model, loss_function=nn.MSELoss(), params=dict(model.named_parameters()), data=data)
"""


def test_names_are_no_formulas(run, tmp_path) -> None:
    (tmp_path / "problem.py").write_text(NAMED)
    code, _, err = run(f"{tmp_path / 'problem.py'}:problem", "--k", 1, "--blocks", "--out", tmp_path / "study")
    assert code == 0, err
    found = json.loads((tmp_path / "study" / "spectrum.json").read_text())
    assert next(iter(found["blocks"])) == "$\\frac$.weight"
    assert "&lt;b&gt;.weight" in (tmp_path / "study" / "report.html").read_text()


def test_resuming_makes_no_product_twice(run, spec, tmp_path) -> None:
    out = tmp_path / "study"
    _, first, _ = run(spec, "--k", 3, "--out", out, "--json")
    code, again, _ = run(spec, "--k", 3, "--out", out, "--resume", "--json")
    first, again = json.loads(first), json.loads(again)
    assert code == 0
    assert first["products"] > 100
    assert again["products"] == 0
    for name in ("ends", "trace", "frobenius_norm", "density"):
        assert again[name] == first[name]


@pytest.mark.parametrize("made", [False, True])
def test_resuming_nothing_begins(run, spec, tmp_path, made) -> None:
    out = tmp_path / "study"
    if made:
        out.mkdir()
    first, again = (run(spec, "--k", 1, "--out", out, "--resume", "--json") for _ in range(2))
    assert (first[0], again[0]) == (0, 0)
    assert json.loads(first[1])["products"] > 0
    assert json.loads(again[1])["products"] == 0


def test_the_size_of_the_journal_is_reported(run, spec, tmp_path) -> None:
    out = tmp_path / "study"
    _, text, _ = run(spec, "--k", 1, "--out", out)
    size = (out / "journal" / "products.records").stat().st_size
    assert size > 26 * 26 * 8
    assert re.search(rf"product journal on disk +{size / 1e6:.3g} MB\n", text)
    assert json.loads((out / "spectrum.json").read_text())["journal_bytes"] == size
    assert "on disk" not in run(spec, "--k", 1)[1]


@pytest.mark.slow
def test_what_a_deadline_leaves_undone_is_said_and_can_be_done_later(run, tmp_path) -> None:
    out = tmp_path / "study"
    code, text, _ = run("digits", "--deadline", "0.001s", "--blocks", "--out", out)
    assert code == 3
    for what in ("eigenvalues LA: not done", "trace: not done", "blocks: not done", "density: 8 probes of 1 steps"):
        assert what in text
    assert "not done by the deadline" in (out / "report.html").read_text()
    code, text, _ = run("digits", "--k", 2, "--out", out, "--resume")
    assert code == 0
    assert "all steps are complete" in text
    assert "0.weight " not in text  # no block is finished, and none was requested


SLOW = """
import os, time
from torch import autograd

class Nap(autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(float(os.environ["CURVOP_TEST_NAP"]))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return Nap.apply(gradient)

class Napping(nn.Module):
    def forward(self, x):
        return Nap.apply(x)

def slow():
    problem = network(hidden=40)
    problem["model"] = nn.Sequential(*problem["model"], Napping())
    return problem
"""


@pytest.fixture
def slow(tmp_path: Path) -> str:
    file = tmp_path / "slow.py"
    file.write_text(PROBLEMS + SLOW)
    return f"{file}:slow"


ARGUMENTS = ("--k", 6, "--probes", 2, "--steps", 30, "--blocks", "--json")


def within(run, deadline: float, *argv: object) -> Any:
    """Run a study with a deadline. Check that it uses the time until the deadline, unless all steps are done."""
    begun = time.monotonic()
    found = json.loads(run(*argv, "--deadline", f"{deadline}s", "--json")[1])
    used = time.monotonic() - begun
    assert used < deadline + 1  # one block product, and the load of the machine
    assert not found["undone"] or used > 0.85 * deadline
    return found


@pytest.mark.slow
def test_a_slow_problem_ends_by_its_deadline_with_what_there_is(run, slow, tmp_path, monkeypatch) -> None:
    out = tmp_path / "study"
    monkeypatch.setenv("CURVOP_TEST_NAP", "0")
    whole = json.loads(run(slow, *ARGUMENTS, "--out", tmp_path / "whole")[1])
    assert whole["ok"]

    monkeypatch.setenv("CURVOP_TEST_NAP", "0.008")
    found = within(run, 8, slow, *ARGUMENTS, "--out", out)
    assert not found["ok"]
    upper = found["ends"][0]
    assert upper["which"] == "LA"
    assert len(upper["values"]) == len(upper["bounds"]) > 0  # certified, converged or not
    assert any(re.fullmatch("blocks: (not|. of 4) done by the deadline", step) for step in found["undone"])
    if upper["converged"] < 6:
        assert re.match(r"not converged before time was up: \d of 6 eigenvalues converged; .*", upper["verdict"])
        assert "before time was up" in (out / "report.html").read_text()

    monkeypatch.setenv("CURVOP_TEST_NAP", "0")
    again = json.loads(run(slow, *ARGUMENTS, "--out", out, "--resume")[1])
    assert again["ok"]
    assert again["products"] < whole["products"]  # earlier products are read from disk
    assert any("products on disk and" in note for note in again["notes"])
    for one, other in zip(again["ends"], whole["ends"], strict=True):
        np.testing.assert_allclose(one["values"], other["values"], atol=1e-10)
    assert again["trace"]["value"] == pytest.approx(whole["trace"]["value"])


@pytest.mark.slow
@pytest.mark.parametrize("deadline", [4, 8])
def test_the_time_that_is_left_goes_to_the_most_wanted_step(run, slow, tmp_path, monkeypatch, deadline) -> None:
    """Without an output folder, too. Nothing is left in the folder of temporary files."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("CURVOP_TEST_NAP", "0.006")
    found = within(run, deadline, slow, "--k", 6, "--probes", 2, "--steps", 20)
    assert not list(temporary.iterdir())
    unfinished = [step.partition(":")[0] for step in found["undone"]]
    order = ["eigenvalues LA", "density", "eigenvalues SA", "trace", "norm"]
    assert unfinished == sorted(unfinished, key=order.index)
    assert found["density"]["steps"] > 0
    assert len(found["ends"][0]["values"]) == len(found["ends"][0]["bounds"]) > 0
    if "eigenvalues LA" in unfinished:
        assert "eigenvalues LA: continued in the time that other steps had left" in found["notes"]


class TestSchedule:
    """Time limits, with a clock that stands still unless it is set."""

    NAMES = ("eigenvalues LA", "density", "trace")

    @pytest.fixture
    def clock(self, monkeypatch) -> argparse.Namespace:
        clock = argparse.Namespace(now=100.0)
        monkeypatch.setattr("curvop.cli.spectrum_study.time", argparse.Namespace(monotonic=lambda: clock.now))
        return clock

    def schedule(self, deadline: float | None, writes: bool = False) -> Any:
        return _Schedule(100.0, deadline, list(self.NAMES), writes)

    def test_each_step_gets_a_share_of_what_is_left_for_it_and_the_later_steps(self, clock) -> None:
        schedule = self.schedule(80.0)
        assert schedule.end("density") == 179.5
        assert schedule.limit("eigenvalues LA") == pytest.approx(100 + 79.5 * 4 / 7.5)
        clock.now = 110  # the first step needed less
        assert schedule.limit("density") == pytest.approx(110 + 69.5 * 3 / 3.5)
        clock.now = 150
        assert schedule.limit("trace") == 179.5
        clock.now = 500
        assert schedule.limit("trace") == 500

    def test_an_estimate_that_would_not_be_finished_leaves_its_time_to_earlier_steps(self, clock) -> None:
        schedule = self.schedule(80.0)
        clock.now = 150
        schedule.record(50.0, 100)
        assert schedule.limit("trace") == 150  # 60 products would take 30 seconds
        assert schedule.limit("density") == pytest.approx(150 + 29.5 * 3 / 3.5)
        schedule.record(40.0, 100)
        assert schedule.limit("trace") == 179.5

    def test_time_for_writing_the_files_is_reserved_once_it_is_known(self, clock) -> None:
        schedule = self.schedule(80.0, writes=True)
        assert schedule.end("density") == 177
        with schedule.writing("density"):
            clock.now += 10
        assert schedule.end("density") == 180 - 13
        assert schedule.end("trace") == 177
        with schedule.writing("trace"):
            clock.now += 0.01
        assert schedule.end("trace") == 179.5

    def test_without_a_deadline_there_is_no_limit(self, clock) -> None:
        assert self.schedule(None, writes=True).limit("density") == np.inf


@pytest.mark.slow
def test_finished_blocks_are_shown_without_being_asked_for(run, spec, tmp_path) -> None:
    out = tmp_path / "study"
    _, first, _ = run(spec, "--k", 2, "--blocks", "--out", out, "--json")
    code, again, _ = run(spec, "--k", 2, "--out", out, "--resume", "--json")
    assert code == 0
    assert json.loads(again)["products"] == 0
    assert json.loads(again)["blocks"] == json.loads(first)["blocks"]
    assert "Layer by layer" in (out / "report.html").read_text()
    assert BlockStudy.load(out / "blocks.npz").complete
    code, asked, _ = run(spec, "--k", 2, "--blocks", "--out", out, "--resume", "--json")
    assert json.loads(asked)["products"] == 0
    assert json.loads(asked)["blocks"] == json.loads(first)["blocks"]


@pytest.mark.slow
def test_no_deadline_takes_away_what_is_on_disk(run, spec, tmp_path) -> None:
    out = tmp_path / "study"
    _, first, _ = run(spec, "--k", 2, "--blocks", "--out", out, "--json")
    _, again, _ = run(spec, "--k", 2, "--blocks", "--out", out, "--resume", "--deadline", "0.01s", "--json")
    before, after = json.loads(first), json.loads(again)
    assert after["products"] == 0
    assert after["undone"] == []
    assert after["ends"] == before["ends"]
    for name in before.keys() - {"seconds", "products", "provenance"}:
        assert after[name] == before[name], name


def figures(parsed: Any) -> list[float]:
    """Return all numbers in a JSON value, in order."""
    if isinstance(parsed, dict):
        parsed = list(parsed.values())
    return [number for part in parsed for number in figures(part)] if isinstance(parsed, list) else [parsed]


@pytest.mark.slow
def test_some_blocks_of_a_run_that_was_killed(run, spec, tmp_path, monkeypatch) -> None:
    """Kill a run within the third block: the table shows two blocks, and all after resuming."""
    out, script = tmp_path / "study", "import sys; from curvop.cli.main import main; sys.exit(main(sys.argv[1:]))"
    _, whole, _ = run(spec, "--k", 2, "--blocks", "--out", tmp_path / "whole", "--json")
    (tmp_path / "slow.py").write_text(PROBLEMS + SLOW.replace("hidden=40", "hidden=4"))
    slow = f"{tmp_path / 'slow.py'}:slow"
    command = [sys.executable, "-c", script, "spectrum", slow, "--k", "2", "--blocks", "--out", str(out)]
    process = subprocess.Popen(command, env=os.environ | {"CURVOP_TEST_NAP": "0.003"}, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "blocks" / "block 2").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    monkeypatch.setenv("CURVOP_TEST_NAP", "0")
    code, text, _ = run(slow, "--k", 2, "--out", out, "--resume")
    assert code == 0
    assert "0.bias " in text
    assert "not studied, as time was up: 2.weight and 2.bias" in text
    assert "not studied, as time was up: 2.weight and 2.bias" in (out / "report.html").read_text()
    assert BlockStudy.load(out / "blocks.npz").names == ["0.weight", "0.bias"]
    facts = json.loads((out / "spectrum.json").read_text())["provenance"]
    assert [run["end"] for run in facts["runs"]] == ["killed", "finished"]
    others = 2 * (8 + 2)  # products of the other two blocks, and for their norms
    assert facts["products"] >= json.loads(whole)["products"] - others
    assert facts["runs"][0]["seconds"] > 0.003 * facts["runs"][0]["products"] > 0
    _, text, _ = run(slow, "--k", 2, "--out", out, "--blocks", "--resume", "--json")
    for name, parsed in json.loads(text)["blocks"].items():
        assert figures(parsed) == pytest.approx(figures(json.loads(whole)["blocks"][name]), rel=1e-9, abs=1e-12)


NORMALISED = """
def normalized():
    problem = network()
    problem["model"] = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().train()
    return problem | dict(params=dict(problem["model"].named_parameters()))
"""


def test_batch_statistics_are_warned_of(run, tmp_path) -> None:
    (tmp_path / "normalized.py").write_text(PROBLEMS + NORMALISED)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        _, _, err = run(f"{tmp_path / 'normalized.py'}:normalized", "--k", 1)
    assert "warning: '1' (BatchNorm1d) normalizes each of the 2 batches" in err


def test_a_full_journal_causes_a_warning_and_the_study_continues(run, spec, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("curvop.storage.journal.shutil.disk_usage", lambda path: argparse.Namespace(free=2_000))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, text, err = run(spec, "--k", 1, "--out", tmp_path / "study")
    assert code == 0
    assert re.match("warning: .* has reached max_bytes", err)
    assert "all steps are complete" in text


def test_what_the_report_says_is_no_warning(run, slow, monkeypatch) -> None:
    monkeypatch.setenv("CURVOP_TEST_NAP", "0")
    code, text, err = run(slow, "--k", 3, "--maxiter", 1)
    assert code == 1
    assert "not converged" in text
    assert "error" not in err


@pytest.mark.default_cases("error0*")
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("no luck"), 1, "the study ended early: RuntimeError: no luck"),
        (KeyboardInterrupt(), 130, "the study ended early: it was interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_what_was_found_before_an_error_is_on_disk(run, spec, tmp_path, monkeypatch, error, code, said) -> None:
    out, meanwhile = tmp_path / "study", []

    def fail(*args, **options) -> None:
        meanwhile.append(json.loads((out / "spectrum.json").read_text()))
        raise error

    monkeypatch.setattr("curvop.cli.spectrum_study.frobenius_norm", fail)
    assert run(spec, "--k", 3, "--out", out)[0] == code
    [before], after = meanwhile, json.loads((out / "spectrum.json").read_text())
    assert before["undone"] == ["norm: not done yet"]
    assert after["undone"][0] == "norm: not done"
    assert said in after["undone"][1]
    values = np.linalg.eigvalsh(functorch_hessian(**load(spec)).numpy())
    page = (out / "report.html").read_text()
    assert said in page
    for found in (before, after):
        assert not found["ok"]
        assert found["products"] > 0
        assert found["trace"]["value"] == pytest.approx(values.sum())
        assert found["density"]["probes"] == 8
    for which, expected in (("LA", values[-3:]), ("SA", values[:3])):
        np.testing.assert_allclose(EigenResult.load(out / f"eigenpairs_{which}.npz").values, expected, atol=1e-12)
        assert f"{expected[0]:.10g}" in page
    assert f"{values.sum():.6g}" in page
    monkeypatch.undo()
    again = json.loads(run(spec, "--k", 3, "--out", out, "--resume", "--json")[1])
    assert again["ok"]
    assert again["ends"] == after["ends"]


@pytest.mark.slow
def test_an_error_in_the_blocks_leaves_those_that_are_done(run, spec, tmp_path, monkeypatch) -> None:
    out = tmp_path / "study"

    def fail(values):
        if len(values) == 8:  # the third block
            raise RuntimeError("no luck")
        return np.linalg.eigvalsh(values)

    monkeypatch.setattr(sys.modules["curvop.spectrum.blocks"], "eigvalsh", fail)
    code, _, err = run(spec, "--k", 1, "--blocks", "--out", out)
    assert code == 1
    assert "no luck" in err
    assert BlockStudy.load(out / "blocks.npz").names == ["0.weight", "0.bias"]
    assert json.loads((out / "spectrum.json").read_text())["undone"][0] == "blocks: not done"


@pytest.mark.parametrize(
    ("argv", "room", "said"),
    [
        (["--steps", "1000"], 8 * 26 * 31, "--steps 1000: the basis of one probe, 26 vectors of 26 numbers, takes"),
        ([], 4 * 8 * 52 * 26 - 1, "the workspace of trace and norm, 208 vectors"),
    ],
)
def test_memory_is_counted_before_anything_is_computed(run, spec, tmp_path, monkeypatch, argv, room, said) -> None:
    monkeypatch.setattr("curvop.cli.spectrum_study.available_bytes", lambda device=None: room)
    monkeypatch.setattr("curvop.cli.spectrum_study.evaluated", lambda A: pytest.fail("it was evaluated"))
    code, _, err = run(spec, *argv, "--out", tmp_path / "study")
    assert code == 2
    assert said in err
    assert "--block of the matrix" in err
    assert "memory=" not in err
    assert not (tmp_path / "study").exists()


BARS = {"eigsh": 2, "certify": 2, "trace": 1, "norm": 1, "density": 1}
FEW = ("--k", 2, "--probes", 2, "--steps", 12)


@pytest.fixture
def few_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CURVOP_TEST_NAP", "0.02")
    monkeypatch.setattr("curvop.operators.progress._DELAY", 0.01)
    (tmp_path / "few_slow.py").write_text(PROBLEMS + SLOW.replace("hidden=40", "hidden=4"))
    return f"{tmp_path / 'few_slow.py'}:slow"


@pytest.mark.slow
def test_a_log_has_a_line_for_each_step(run, few_slow) -> None:
    err = run(few_slow, *FEW)[2]
    assert err.count("\r") == err.count("\n") == sum(BARS.values())
    for name, count in BARS.items():
        done = "" if name == "eigsh" else r"100%\|.*"
        assert len(re.findall(rf"^\s*{name}: {done}\d+ ?.*products", err, re.MULTILINE)) == count, name
    assert len(re.findall(r"certify: .* 34/34 \[", err)) == 2  # 2 pairs, 8 for the noise, and 24 of the search


@pytest.mark.slow
def test_on_a_terminal_each_step_says_when_it_will_end(few_slow, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["spectrum", few_slow, *map(str, FEW)]) == 0
    shown = sys.stderr.getvalue()
    for name, total in {"certify": 34, "trace": 52, "density": 24}.items():
        counts = re.findall(rf"{name}: +\d+%\|[^|]*\| (\d+)/{total} \[\d\d:\d\d<\d\d:\d\d", shown)
        assert any(0 < int(count) < total for count in counts), name


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--resume"], "argument --resume: needs --out"),
        (["--out", "nowhere/study"], "argument --out: no folder"),
        (["--out", "{full}"], "is not empty: pass --resume"),
        (["--out", "{full}", "--resume"], "holds other files but no study: pass another --out"),
        (["--out", "{file}"], "is not a folder"),
        (["--deadline", "soon"], "is not a duration > 0 such as"),
        (["--probes", "0"], "argument --probes: must be >= 1"),
        (["--matrix", "jacobian"], "invalid choice"),
    ],
)
def test_bad_arguments(run, spec, tmp_path, argv, said) -> None:
    (tmp_path / "full").mkdir()
    for file in (tmp_path / "full" / "x", tmp_path / "file"):
        file.write_text("")
    places = {name: tmp_path / name for name in ("full", "file")}
    code, _, err = run(spec, *(part.format(**places) for part in argv))
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_a_study_of_something_else(run, spec, tmp_path) -> None:
    out = tmp_path / "study"
    run(spec, "--k", 1, "--out", out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    code, _, err = run(spec, "--k", 1, "--out", out, "--resume", "--dtype", "float32")
    assert code == 2
    assert "dtype" in err
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_a_study_is_extended(run, slow, tmp_path, monkeypatch) -> None:
    """More steps, probes and eigenvalues take only the products that are not on disk."""
    monkeypatch.setenv("CURVOP_TEST_NAP", "0")
    out = tmp_path / "study"
    small, large = ("--k", 2, "--probes", 3, "--steps", 10), ("--k", 5, "--probes", 4, "--steps", 25)
    first, extended = (json.loads(run(slow, *n, "--out", out, "--resume", "--json")[1]) for n in (small, large))
    fresh = json.loads(run(slow, *large, "--json")[1])
    assert extended["ok"]
    for found, expected in zip(extended["ends"], fresh["ends"], strict=True):
        np.testing.assert_allclose(found["values"], expected["values"], atol=1e-12)
    np.testing.assert_allclose(figures(extended["density"]), figures(fresh["density"]), rtol=1e-8, atol=1e-10)
    saved = 3 * 10 + 60 + 60  # density, trace and norm
    assert extended["products"] <= fresh["products"] - saved
    assert first["notes"] == []
    assert "density: continued, 30 products on disk and 70 new products" in extended["notes"]
    assert any(note.startswith("eigenvalues LA: continued") for note in extended["notes"])
    assert "density: continued, 30 products on disk" in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_study_with_fewer_steps_uses_a_part_of_the_density(run, spec, tmp_path) -> None:
    out, few = tmp_path / "study", ("--k", 1, "--probes", 2, "--steps", 5)
    run(spec, "--k", 1, "--out", out)
    files = {file: file.read_bytes() for file in (out / "density").iterdir() if file.name == "steps.records"}
    again = json.loads(run(spec, *few, "--out", out, "--resume", "--json")[1])
    fresh = json.loads(run(spec, *few, "--json")[1])
    assert again["ok"]
    assert again["products"] == 0
    np.testing.assert_allclose(figures(again["density"]), figures(fresh["density"]), rtol=1e-8, atol=1e-10)
    assert again["notes"] == [
        "density: 2 probes of 5 steps, as requested; the folder has up to 8 probes and 22 steps (--probes, --steps)"
    ]
    assert {file: file.read_bytes() for file in files} == files
    assert json.loads(run(spec, "--k", 1, "--out", out, "--resume", "--json")[1])["products"] == 0


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1h30m10s", 5410)])
def test_times(text: str, seconds: float) -> None:
    from curvop.cli.arguments import parse

    options = parse(["spectrum", "digits", "--deadline", text])
    assert options is not None
    assert options.deadline == seconds
