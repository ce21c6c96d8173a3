import base64
import io
import json
import math
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backmix.train import claims, metrics, report, results, scores
from backmix.train.evaluate import evaluate
from backmix.train.figures import acceptance_curve
from backmix.train.judge import judge, scored
from backmix.train.log import write_status
from backmix.train.options import Arpl, BackMix, EvaluateOptions, Run, Softmax, Split, Ssod
from backmix.train.outputs import Outputs, load_outputs, store
from backmix.train.run import train
from backmix.train.run_folder import as_document
from tests.runs import tiny_run, tiny_set

CLASSES = ["cat", "dog", "<script>alert(1)</script>"]
METHODS = {
    "softmax": (Softmax(), 1.0),
    "cutout": (BackMix(mask="grey"), 1.4),
    "backmix": (BackMix(), 1.9),
}


def outputs(name: str, kind, n: int, strength: float, seed: int) -> Outputs:
    """Make logits whose largest is larger for known images, the more so the larger `strength`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n) if kind == "known" else np.full(n, -1)
    logits = rng.normal(size=(n, 3)).astype(np.float32)
    if kind == "known":
        logits[np.arange(n), labels] += strength
    return Outputs(
        name=name,
        kind=kind,
        logits=logits,
        features=np.zeros((n, 2), np.float32),
        labels=labels,
        index=np.arange(n),
        files=(f"{name}.beton",),
        digest="d1",
        bad=("x/<b>.png",) if kind == "unknown" else (),
    )


def write_run(root: Path, kind: str, seed: int, *, split: Split | None = None, **options) -> Path:
    """Write the folder of a finished and judged run, without training it."""
    chosen, strength = METHODS[kind]
    folder = root / f"{kind}-{seed}-{len(list(root.iterdir()))}"
    run = Run(
        data=(Path("train.beton"),),
        out=folder,
        seed=seed,
        split=split or Split(),
        **{"method": chosen, "epochs": 2, **options},
    )
    (folder / "scores").mkdir(parents=True)
    config = {
        "run": as_document(run),
        "recipe": f"demo-{kind}",
        "resolved": {"precision": "fp32", "device": "cpu", "threads": 1},
        "classes": CLASSES,
        "known": [0, 1, 2],
        "data": {"files": ["train.beton"], "digest": f"data{seed}", "samples": 100},
        "versions": {"torch": "2.13.0", "backmix": "0.1.0"},
        "commit": "abc123",
        "command": f"backmix train demo-{kind} --seed {seed}",
    }
    (folder / "config.json").write_text(json.dumps(config))
    known = outputs("known", "known", 60, strength, 10 * seed)
    unknown = outputs("unknown", "unknown", 40, strength, 10 * seed + 1)
    for one in (known, unknown):
        store(folder / "scores" / f"{one.name}.safetensors", one)
    document = {
        "split": None,
        "classes": CLASSES,
        "notes": [],
        **judge(scored(known), [scored(unknown)]),
    }
    if split and split.protocol:
        document["split"] = {"protocol": split.protocol, "family": "A", "list": split.list}
    (folder / "metrics.json").write_text(json.dumps(document))
    rows = [
        {
            "step": 4 * epoch,
            "epoch": epoch - 1,
            "consumed": 100,
            "samples": 100,
            "loss": 1 / epoch,
            "accuracy": epoch / 3,
            "lr": 0.1,
            "grad_norm": 1.0,
            "bad_steps": 1,
            **({"mask_hit": 0.5} if kind == "backmix" else {}),
        }
        for epoch in (1, 2)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_status(folder, "finished", 8)
    return folder


@pytest.fixture(scope="module")
def nine(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root, method, seed) for method in METHODS for seed in (0, 1, 2)]


def logit_auroc(run: Path) -> float:
    return json.loads((run / "metrics.json").read_text())["unknown"]["unknown"]["scores"][
        "max_logit"
    ]["auroc"]


def row_of(groups: list[results.Group], label: str, score: str = "max_logit") -> results.Row:
    (table,) = results.tables(groups)
    (row,) = [row for row in table.rows if (row.label, row.score) == (label, score)]
    return row


# --- the numbers --------------------------------------------------------------------------------


def test_repetitions_are_averaged_and_differences_are_paired_by_seed(nine):
    groups = results.read_all(nine)
    assert [group.label for group in groups] == ["softmax", "Cutout", "BackMix"]
    softmax, backmix = nine[0:3], nine[6:9]
    row = row_of(groups, "BackMix")
    values = [logit_auroc(run) for run in backmix]
    assert row.runs == 3
    assert row.figures["auroc"].mean == pytest.approx(sum(values) / 3)
    assert row.figures["auroc"].sd == pytest.approx(np.std(values, ddof=1))
    pairs = [after - logit_auroc(b) for after, b in zip(values, softmax, strict=True)]
    assert row.differences["auroc"].values == pytest.approx(pairs)
    # The spread of paired differences is not that of the two methods: it is its own figure.
    assert row.differences["auroc"].sd == pytest.approx(statistics.stdev(pairs))
    assert row_of(groups, "softmax").differences == {}


def test_the_order_of_folders_changes_nothing_but_the_order_of_methods(nine):
    forwards = results.tables(results.read_all(nine))
    backwards = results.tables(results.read_all(nine[::-1]))
    assert {r.label: r for r in forwards[0].rows} == {r.label: r for r in backwards[0].rows}


def test_a_run_without_its_baseline_has_no_difference(nine):
    row = row_of(results.read_all([nine[0], *nine[7:]]), "BackMix")  # softmax of seed 0 only
    assert row.runs == 2 and row.differences == {}


def test_a_single_run_has_no_spread(nine):
    spread = row_of(results.read_all(nine[:1]), "softmax").figures["auroc"]
    assert spread.sd is None
    assert spread.percent() == f"{100 * logit_auroc(nine[0]):.1f}"


def test_percent_by_hand():
    # Mean 0.25, deviations -0.05, 0, 0.05: sd 0.05.
    assert results.Spread((0.2, 0.25, 0.3)).percent() == "25.0 ± 5.0"
    assert results.Spread((-0.02, -0.04)).percent(sign=True) == "\N{MINUS SIGN}3.0 ± 1.4"
    assert results.Spread((0.012,)).percent(sign=True) == "+1.2"


def test_configurations_of_one_method_are_kept_apart_and_named_by_what_differs(tmp_path):
    small = write_run(tmp_path, "backmix", 0, method=BackMix(patch=4))
    large = write_run(tmp_path, "backmix", 0, method=BackMix(patch=8, fill="keep"))
    base = write_run(tmp_path, "softmax", 0)
    labels = [group.label for group in results.read_all([small, large, base])]
    assert labels == ["softmax", "BackMix (patch 4, fill grey)", "BackMix (patch 8, fill keep)"]


def test_class_lists_are_repetitions_and_families_are_not(tmp_path):
    runs = [
        write_run(tmp_path, "softmax", 0, split=Split(protocol="cifar10", list=number))
        for number in (2, 0, 1)
    ]
    (group,) = results.read_all(runs)
    assert [run.name for run in group.runs] == [f"list A{i}, seed 0" for i in range(3)]
    other = write_run(tmp_path, "softmax", 0, split=Split(protocol="cifar10", family="B-cac"))
    labels = [group.label for group in results.read_all([*runs, other])]
    assert labels == ["softmax (family A)", "softmax (family B-cac)"]


def test_every_repetition_may_begin_with_weights_of_its_own(tmp_path):
    def of(number, init):
        split = Split(protocol="cifar10", list=number)
        return write_run(tmp_path, "softmax", 0, split=split, init=init)

    begun = [of(number, Path(f"before/{number}")) for number in (0, 1)]
    fresh = [of(number, None) for number in (2, 3)]
    groups = results.read_all([*begun, *fresh])
    assert [[run.folder for run in group.runs] for group in groups] == [begun, fresh]


def test_methods_judged_on_different_problems_say_so_in_every_row(tmp_path):
    """Figures of different families or without a protocol must not pass for comparable ones."""
    plain = write_run(tmp_path, "softmax", 0)
    published = write_run(tmp_path, "backmix", 0, split=Split(protocol="cifar10"))
    labels = {group.label for group in results.read_all([plain, published])}
    assert labels == {"softmax [no protocol]", "BackMix [cifar10 A]"}


def test_a_baseline_of_other_training_is_no_baseline(tmp_path):
    base = write_run(tmp_path, "softmax", 0)
    longer = write_run(tmp_path, "backmix", 0, epochs=100)
    groups = results.read_all([base, longer])
    assert row_of(groups, "BackMix").differences == {}
    note = "BackMix is not compared with softmax: the softmax run has epochs 2, not 100"
    said = report.write_report([base, longer], tmp_path / "report.html")
    assert said.endswith(f"- {note}")
    assert f"<li>{note}.</li>" in (tmp_path / "report.html").read_text()
    ((first,), (second,)) = (group.runs for group in groups)
    assert results.unpaired(first, [first]) == results.unpaired(second, [second]) == ""


@pytest.mark.parametrize(
    ("mask", "label"),
    [
        ("cam", "BackMix"),
        ("grey", "Cutout"),
        ("none", "patch without mask"),
        ("oracle", "oracle mask"),
    ],
)
def test_ablations_have_names(mask, label):
    assert results.method_label({"type": "BackMix", "mask": mask}) == label


# --- the curves ---------------------------------------------------------------------------------


def test_curve_by_hand():
    # Known 4, 3, 1; unknown 3, 2. Accepted from above: 4 (k), 3 (k and u tie), 2 (u), 1 (k).
    known, unknown = np.array([4.0, 3.0, 1.0]), np.array([3.0, 2.0])
    shares = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    curve = acceptance_curve(known, np.ones(3, bool), unknown, shares)
    # (0, 1/3), then the tie's slope to (1/2, 2/3), flat to 1, where the last known one comes.
    np.testing.assert_allclose(curve, [1 / 3, 1 / 2, 2 / 3, 2 / 3, 1])
    right = np.array([True, False, True])
    curve = acceptance_curve(known, right, unknown, shares)
    np.testing.assert_allclose(curve, [1 / 3, 1 / 3, 1 / 3, 1 / 3, 2 / 3])


def test_the_area_under_the_curves_is_the_metric():
    known = outputs("known", "known", 500, 1.0, 0)
    unknown = outputs("unknown", "unknown", 300, 1.0, 1)
    right = known.logits.argmax(1) == known.labels
    k, u = scores.max_logit(known.logits), scores.max_logit(unknown.logits)
    k, u = k.round(1), u.round(1)  # many ties
    shares = np.linspace(0, 1, 30_001)
    for counted, area in (
        (np.ones(500, bool), metrics.auroc(k, u)),
        (right, metrics.oscr(k, right, u)),
    ):
        curve = acceptance_curve(k, counted, u, shares)
        assert np.trapezoid(curve, shares) == pytest.approx(area, abs=1e-3)


# --- the page -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(nine, tmp_path_factory) -> tuple[str, str]:
    """Return the page of nine runs and the Markdown that came with it."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    text = report.write_report(nine, path)
    return path.read_text(encoding="utf-8"), text


@pytest.fixture(scope="module")
def page(written) -> str:
    return written[0]


def test_the_page_asks_no_network_and_runs_no_script(page):
    addresses = re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?([^"'\s>)]+)""", page)
    assert all(address.startswith(("#", "data:")) for address in addresses), addresses
    assert re.findall(r"<script[^>]*>", page) == ['<script type="application/json" id="numbers">']
    assert "@import" not in page and "<link" not in page
    assert len(page) < 5_000_000


def test_foreign_text_is_escaped(page):
    assert "<script>alert" not in page and "x/<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_tables_hold_the_figures_of_the_runs(nine, page):
    values = [logit_auroc(run) for run in nine[6:]]
    mean, sd = 100 * statistics.fmean(values), 100 * statistics.stdev(values)
    assert f"{mean:.1f} ± {sd:.1f}" in page
    for value in values:
        assert f">{100 * value:.2f}</td>" in page
    changes = [after - logit_auroc(b) for after, b in zip(values, nine[:3], strict=True)]
    assert f"{sum(change > 0 for change in changes)} of 3" in page


def test_the_raw_numbers_come_back_from_the_page(nine, page):
    text = re.search(
        r'<script type="application/json" id="numbers">(.*?)</script>', page, re.DOTALL
    )
    assert text
    numbers = json.loads(text[1])
    assert [group["label"] for group in numbers["groups"]] == ["softmax", "Cutout", "BackMix"]
    run = numbers["groups"][2]["runs"][1]
    assert run["metrics"] == json.loads((nine[7] / "metrics.json").read_text())
    assert run["config"]["classes"] == CLASSES


def test_every_chart_has_a_sentence_a_table_and_no_small_letters(page):
    figures = re.findall(r"<figure aria-labelledby.*?</figure>", page, re.DOTALL)
    assert len(figures) == 4  # ROC, OSCR, histograms, training
    for figure in figures:
        assert "<figcaption>" in figure and "Data of this chart" in figure and "<svg" in figure
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", figure)]
        # An SVG unit is a point here: 4/3 of a pixel.
        assert sizes and min(sizes) * 4 / 3 >= 11
        assert not re.search(r"#(?:[0-9a-f]{6})\b", figure.lower()), "a colour outside the theme"


def test_the_header_says_where_the_figures_come_from(page):
    for fact in ("abc123", "torch 2.13.0", "data0", "0, 1, 2", "--seed 2", "100 training images"):
        assert fact in page


def test_missing_training_data_leaves_a_sentence_in_place_of_the_picture(page):
    assert page.count("There is no picture:") == 2  # Cutout and BackMix


def test_the_markdown_is_that_of_the_tables(nine, written):
    lines = [line for line in written[1].splitlines() if line.startswith("| MaxLogit | BackMix |")]
    row = row_of(results.read_all(nine), "BackMix")
    assert len(lines) == 1
    assert row.figures["auroc"].percent() in lines[0]
    assert row.differences["auroc"].percent(sign=True) in lines[0]


def test_two_unknown_sets_make_two_tables(tmp_path):
    run = write_run(tmp_path, "softmax", 0)
    other = replace(outputs("far", "unknown", 30, 1.0, 5), bad=())
    store(run / "scores" / "far.safetensors", other)
    document = json.loads((run / "metrics.json").read_text())
    known = outputs("known", "known", 60, 1.0, 0)
    document["unknown"] |= judge(scored(known), [scored(other)])["unknown"]
    (run / "metrics.json").write_text(json.dumps(document))
    found = results.tables(results.read_all([run]))
    assert [table.unknown for table in found] == ["unknown", "far"]
    assert found[1].images == "60 known and 30 unknown images"
    report.write_report([run], tmp_path / "report.html")


def test_runs_judged_on_known_images_only_have_a_page_too(tmp_path):
    run = write_run(tmp_path, "softmax", 0)
    document = json.loads((run / "metrics.json").read_text())
    document["unknown"] = {}
    (run / "metrics.json").write_text(json.dumps(document))
    report.write_report([run], tmp_path / "report.html")
    assert "judged on known images only" in (tmp_path / "report.html").read_text()


# --- what background says -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> list[Path]:
    """Runs of softmax, of BackMix with SSOD, and of ARPL, trained, and judged on two classes."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("trained")
    data, test = tiny_set(root / "train.beton"), tiny_set(root / "test.beton", seed=1)
    methods = {"softmax": Softmax(), "mix": BackMix(patch=20, host=Ssod()), "arpl": Arpl()}
    for name, method in methods.items():
        run = tiny_run(data, root / name, method, model="classifier32-quarter", save_steps=0)
        run = replace(run, split=Split(known=("a", "b")))
        assert train(run, f"test-{name}", ["backmix", "train"]) == 0
        evaluate(run.out, EvaluateOptions(test=(test,), threads=1, device="cpu"))
    return [root / name for name in methods]


@pytest.fixture(scope="module")
def claimed(trained, tmp_path_factory) -> tuple[str, str]:
    """Return the page of these runs and the Markdown that came with it."""
    path = tmp_path_factory.mktemp("claimed") / "report.html"
    text = report.write_report(trained, path)
    return path.read_text(encoding="utf-8"), text


def test_the_page_shows_what_background_says(claimed):
    page = claimed[0]
    pictures = re.findall(r'<img src="data:image/(\w+);base64,([^"]+)" alt="([^"]*)"', page)
    assert len(pictures) == 2  # what BackMix mixes, and what SSOD samples
    for _, data, alt in pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.load()
            assert image.width > 800
        assert len(alt) > 100
    assert "a with a patch of" in pictures[0][2] and "the donor&#39;s map" in pictures[0][2]
    assert re.search(r"Locations sampled: [ab]: \d+ known, \d+ unknown", pictures[1][2])
    titles = re.findall(r"<h3 id=.(?:evidence|features-\d).>([^<]*)</h3>", page)
    assert titles == [
        "Class evidence of background cells",
        *(f"Directions of features: {label}" for label in ("softmax", "BackMix + SSOD", "ARPL")),
    ]
    assert "cells of pasted background, from training images" in page
    (missing,) = re.findall(r"<p>Not shown here:</p>\s*<ul>(.*?)</ul>", page, re.DOTALL)
    # In three epochs softmax may have become sure enough of some location, or not.
    assert "ARPL, what stands in" in missing and "BackMix" not in missing
    assert len(page) < 2_000_000


def test_the_evidence_on_the_page_is_that_of_the_images(trained, claimed):
    run = trained[0]
    network = claims.open_network(run)
    known, found = (
        claims.background_evidence(
            network,
            claims.look(
                network,
                claims.stored_images(load_outputs(run / "scores" / f"{name}.safetensors"), 512),
            ),
        )
        for name in ("known", "unknown")
    )
    row = f"<td>softmax</td><td>unknown</td><td>20</td><td>{found.of_background.mean():.2f}</td>"
    assert row in claimed[0]
    assert f"<td>{found.of_rest.mean():.2f}</td><td>{found.largest.mean():.2f}</td>" in claimed[0]
    shares = [(e.of_background > np.median(known.of_rest)).mean() for e in (known, found)]
    assert f"softmax known {shares[0]:.1%}, unknown {shares[1]:.1%}" in claimed[0]


def test_own_scores_come_first_and_the_others_are_folded_away(trained, claimed):
    page, text = claimed
    shown, folded = re.findall(r'aria-label="(?:Results|Further scores) on unknown">.*?</table>',
                               page, re.DOTALL)  # fmt: skip
    scores = [re.findall(r'scope="rowgroup"[^>]*>([^<]*)<', part) for part in (shown, folded)]
    assert scores[0] == [
        "SSOD head",
        "SSOD joint",
        "ARPL",
        "ARPL without norm",
        "MaxLogit",
        "MSP",
        "Energy",
    ]
    stored = set(
        json.loads((trained[0] / "metrics.json").read_text())["unknown"]["unknown"]["scores"]
    )
    shown_names = {results.SCORE_NAMES.get(name, name) for name in stored}
    assert set(scores[1]) == shown_names - {"MaxLogit", "MSP", "Energy"} and scores[1]
    assert (
        "<summary>" in page[: page.index('aria-label="Further scores')].rsplit("</details>", 1)[-1]
    )
    assert "| SSOD head | BackMix + SSOD |" in text and "| GEN |" not in text
    # A score that only one method has is a curve of that method alone.
    assert "SSOD head: BackMix + SSOD" in page and "SSOD head: softmax" not in page


def test_curves_of_stored_scores_are_those_of_the_scores(trained):
    run = results.read_judged(trained[1])
    curve = report._curve(run, "unknown", "ssod", "auroc")
    known, unknown = (o.extras["rejection"] for o in (run.known, run.unknown["unknown"]))
    want = acceptance_curve(known, np.ones(len(known), bool), unknown, np.linspace(0, 1, 201))
    np.testing.assert_allclose(curve, want)


def test_data_that_moved_leave_sentences(trained, tmp_path):
    """The training set is gone: evidence of the test sets stays, locations go."""
    for run in trained[:2]:
        shutil.copytree(run, tmp_path / run.name)
        config = json.loads((tmp_path / run.name / "config.json").read_text())
        for section in (config["data"], config["run"]):
            section["files" if "files" in section else "data"] = [str(tmp_path / "gone.beton")]
        (tmp_path / run.name / "config.json").write_text(json.dumps(config))
    out = tmp_path / "report.html"
    report.write_report([tmp_path / "softmax", tmp_path / "mix"], out)
    page = out.read_text()
    (missing,) = re.findall(r"<p>Not shown here:</p>\s*<ul>(.*?)</ul>", page, re.DOTALL)
    assert "BackMix + SSOD, sampled locations: the training data: " in missing
    assert missing.count("what stands in for unknown images") == 2
    assert "There is no picture:" in page and 'id="evidence"' in page and 'id="features-2"' in page


def test_a_network_that_is_damaged_leaves_a_sentence(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"nonsense")
    report.write_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "softmax: " in page and "model.safetensors is damaged" in page
    assert 'id="evidence"' not in page


# --- bad input ----------------------------------------------------------------------------------


def break_run(run: Path, name: str, content: str | None) -> None:
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "is no run folder: it has no config.json"),
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "{}", "config.json"),
        ("config.json", "[]", "config.json"),
        ("status.json", '{"state": "stopped", "step": 5, "why": "SIGTERM"}', "stopped at step 5"),
        ("status.json", '{"state": "running", "step": 5, "why": ""}', "killed; the same command"),
        ("metrics.json", None, "has not been evaluated: run `backmix evaluate"),
        ("metrics.json", "{", "damaged"),
        ("metrics.json", '{"unknown": {}}', "damaged"),
        ("metrics.json", "[]", "metrics.json is damaged"),
        ("log.jsonl", None, "log.jsonl is missing"),
        ("log.jsonl", "", "log.jsonl is damaged: it has no rows"),
        ("log.jsonl", "{]", "log.jsonl, line 1, is damaged"),
        ("log.jsonl", "\x80", "log.jsonl, line 1, is damaged"),
        ("scores/known.safetensors", None, "known.safetensors"),
        ("scores/unknown.safetensors", "nonsense", "unknown.safetensors is damaged"),
    ],
)
def test_a_folder_that_cannot_be_reported_is_named_with_the_reason(
    tmp_path, name, content, message
):
    run = write_run(tmp_path, "softmax", 0)
    break_run(run, name, content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        report.write_report([run], tmp_path / "report.html")
    assert str(run) in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def replaced(path: Path, name: str, value) -> None:
    """Replace one part of a JSON file, by dotted name; None removes it."""
    document = json.loads(path.read_text())
    *sections, last = name.split(".")
    part = document
    for section in sections:
        part = part[section]
    part[last] = value
    if value is None:
        del part[last]
    path.write_text(json.dumps(document) + "\n")


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("metrics.json", "split", 3),
        ("metrics.json", "split", {"protocol": "cifar10"}),
        ("metrics.json", "split", None),
        ("metrics.json", "notes", "text"),
        ("metrics.json", "notes", [{}]),
        ("metrics.json", "known", []),
        ("metrics.json", "known.n", "60"),
        ("metrics.json", "unknown", []),
        ("metrics.json", "unknown.unknown", []),
        ("metrics.json", "unknown.unknown.n", None),
        ("metrics.json", "unknown.unknown.scores", []),
        ("metrics.json", "unknown.unknown.scores.msp", 0.5),
        ("metrics.json", "unknown.unknown.scores.msp.auroc", None),
        ("metrics.json", "unknown.unknown.scores.msp.auroc", "0.5"),
        ("metrics.json", "unknown.unknown.scores.msp.auroc", 50.0),
        ("config.json", "run.seed", None),
        ("config.json", "run.split", []),
        ("config.json", "run.loader", {}),
        ("config.json", "run.method", "BackMix"),
        ("config.json", "run.method", {"type": "BackMix"}),
        ("config.json", "run.method", {"type": "BackMix", "mask": "blue"}),
        ("config.json", "run.method", {"type": "BackMix", "mask": []}),
        ("config.json", "classes", [3]),
        ("config.json", "data.files", "train.beton"),
        ("config.json", "data.digest", 5),
        ("config.json", "data.samples", 0),
        ("config.json", "data.samples", None),
        ("config.json", "versions", None),
        ("config.json", "commit", None),
        ("config.json", "command", ["backmix"]),
    ],
    ids=str,
)
def test_a_damaged_part_of_a_document_is_named_with_its_file(tmp_path, file, name, value):
    run = write_run(tmp_path, "softmax", 0)
    replaced(run / file, name, value)
    with pytest.raises(ValueError, match=re.escape(f"{run / file} is damaged: ")) as caught:
        report.write_report([run], tmp_path / "report.html")
    assert name.rsplit(".", 1)[-1] in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": None},
        {"consumed": "100"},
        {"loss": "0.5"},
        {"accuracy": None},
        {"mask_hit": "0.5"},
        {"bad_steps": []},
    ],
    ids=str,
)
def test_a_damaged_row_of_the_log_is_named_with_its_line(tmp_path, change):
    run = write_run(tmp_path, "softmax", 0)
    first, second = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    second = {name: value for name, value in (second | change).items() if value is not None}
    for row in (second, list(second)):
        (run / "log.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(row)}\n")
        with pytest.raises(ValueError, match=r"log\.jsonl, line 2, is damaged: "):
            results.read_all([run])


def test_a_picture_that_cannot_be_drawn_leaves_a_sentence(tmp_path, monkeypatch):
    def fail(*_) -> bytes:
        raise ValueError("x1 must not be below x0")

    monkeypatch.setattr(report, "run_examples", lambda *_: None)
    monkeypatch.setattr(report, "grid_picture", fail)
    report.write_report([write_run(tmp_path, "backmix", 0)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "There is no picture: x1 must not be below x0" in page


def test_an_empty_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^the page needs a name: -o FILE\.html"):
        report.write_report([write_run(tmp_path, "softmax", 0)], Path(""))


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ((), "there is no softmax run"),
        ((1,), "there is no softmax run of the same class list, seed and data"),
        ((1, 0), ""),
    ],
)
def test_a_row_without_difference_says_why(nine, chosen, reason):
    run = results.read_judged(nine[6])  # BackMix, seed 0
    assert results.unpaired(run, [results.read_judged(nine[seed]) for seed in chosen]) == reason


def test_two_passes_an_epoch_are_no_reason_not_to_compare(tmp_path):
    base = write_run(tmp_path, "softmax", 0)
    twice = write_run(tmp_path, "backmix", 0, method=Arpl(confusing=True), epochs=4)
    longer = write_run(tmp_path, "backmix", 1, method=Arpl(confusing=True), epochs=4)
    baselines = [results.read_judged(base)]
    assert results.unpaired(results.read_judged(twice), baselines) == ""
    assert "seed" in results.unpaired(results.read_judged(longer), baselines)
    more = write_run(tmp_path, "backmix", 0, method=Arpl(confusing=True), epochs=6)
    why = results.unpaired(results.read_judged(more), baselines)
    assert why == "the softmax run has epochs 2, not 3"


def test_notes_stand_once_beside_the_tables_and_name_their_rows(tmp_path):
    runs = [write_run(tmp_path, "softmax", seed) for seed in (0, 1)]
    runs.append(write_run(tmp_path, "backmix", 0))
    for run, notes in zip(
        runs, (["everywhere", "once"], ["everywhere"], ["everywhere"]), strict=True
    ):
        document = json.loads((run / "metrics.json").read_text()) | {"notes": notes}
        (run / "metrics.json").write_text(json.dumps(document))
    said = report.write_report(runs, tmp_path / "report.html").splitlines()
    assert said[-2:] == ["- everywhere", "- softmax (1 of 2 runs): once"]


def test_groups_of_sets_have_tables_of_their_means(tmp_path):
    def of(kind: str, *names: str) -> Path:
        run = write_run(tmp_path, kind, 0)
        known = load_outputs(run / "scores" / "known.safetensors")
        others = [outputs(name, "unknown", 40, 1.0, 7 + len(name)) for name in names]
        for one in others:
            store(run / "scores" / f"{one.name}.safetensors", one)
        found = judge(scored(known), [scored(one, "near") for one in others])
        document = json.loads((run / "metrics.json").read_text()) | found
        (run / "metrics.json").write_text(json.dumps(document))
        return run

    base, mix, less = of("softmax", "a", "bb"), of("backmix", "a", "bb"), of("cutout", "a")
    both, single = results.tables(results.read_all([base, mix, less]))[-2:]
    assert (both.unknown, single.unknown) == ("near: a, bb", "near: a")
    (row,) = [r for r in both.rows if (r.label, r.score) == ("BackMix", "msp")]
    areas = []
    for run in (base, mix):
        sets = json.loads((run / "metrics.json").read_text())["unknown"]
        areas.append(sum(sets[name]["scores"]["msp"]["auroc"] for name in ("a", "bb")) / 2)
    assert row.figures["auroc"].values == pytest.approx([areas[1]])
    assert row.differences["auroc"].values == pytest.approx([areas[1] - areas[0]])
    # A mean over other sets stands in no row beside them.
    assert {row.label for row in single.rows} == {"Cutout"}
    report.write_report([base, mix, less], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h3>Mean over “near: a, bb”</h3>" in page and "<h3>Unknown set “bb”</h3>" in page
    document = json.loads((mix / "metrics.json").read_text())
    document["groups"]["near"]["scores"]["msp"]["oscr"] = "0.5"
    (mix / "metrics.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"metrics\.json is damaged: groups\.near\.scores"):
        results.read_judged(mix)


def test_a_folder_of_a_table_stands_for_its_runs(tmp_path):
    (tmp_path / "table" / "runs").mkdir(parents=True)
    made = [write_run(tmp_path / "table" / "runs", kind, 0) for kind in ("softmax", "cutout")]
    out = tmp_path / "report.html"
    with pytest.raises(ValueError, match=r"holds a table that is not done: .* or name runs"):
        report.write_report([tmp_path / "table"], out)
    stored = {"runs": [{"folder": made[0].name}]}
    (tmp_path / "table" / "table.json").write_text(json.dumps(stored))
    assert "| softmax |" in report.write_report([tmp_path / "table"], out)
    assert results.run_folders([tmp_path / "table", made[1]]) == made
    (tmp_path / "table" / "table.json").write_text('{"runs": [3]}')
    with pytest.raises(ValueError, match=r"table\.json is damaged: it has no folder"):
        report.write_report([tmp_path / "table"], out)
    with pytest.raises(ValueError, match=r"table\.json is no run folder: it is a file"):
        report.write_report([tmp_path / "table" / "table.json"], out)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no run folder"):
        report.write_report([tmp_path / "nowhere"], tmp_path / "report.html")


def test_no_folder_at_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run folder was given"):
        report.write_report([], tmp_path / "report.html")


def test_the_same_run_under_two_names_is_refused(tmp_path):
    first, second = (write_run(tmp_path, "softmax", 0) for _ in range(2))
    with pytest.raises(ValueError, match="the same run twice"):
        report.write_report([first, second], tmp_path / "report.html")


def test_the_same_folder_twice_counts_once(tmp_path):
    run = write_run(tmp_path, "softmax", 0)
    (group,) = results.read_all([run, run / ".." / run.name])
    assert len(group.runs) == 1


def test_a_figure_that_is_no_number_is_refused(tmp_path):
    run = write_run(tmp_path, "softmax", 0)
    document = json.loads((run / "metrics.json").read_text())
    document["known"]["accuracy"] = math.nan
    (run / "metrics.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="not a number"):
        results.read_all([run])


def test_a_folder_to_write_into_that_does_not_exist_is_named(tmp_path):
    run = write_run(tmp_path, "softmax", 0)
    with pytest.raises(ValueError, match="there is no folder"):
        report.write_report([run], tmp_path / "none" / "report.html")
