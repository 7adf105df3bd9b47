"""The accuracy table: rows that can be run, and figures that say what the lines say."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import accuracy, accuracy_table, datasets, record, references, rows
from benchmarks.evaluation import correct
from edge_agent import training
from edge_agent.config import build_config, preset_layer
from edge_agent.distill import Pool
from networks import registry
from networks.modelfile import save_model
from protos import codec
from teacher_service import policy
from teacher_service.terms import Terms
from tests.models import resnet8_facts


def line(row: str, seed: int, student: float, **more: Any) -> dict[str, Any]:
    figures = {"accuracy": {"teacher": 0.995, "student": student}, "share_kept": student / 0.995, "agreement": 0.99}
    facts = {"row": row, "seed": seed, "config_digest": rows.read(row).digest}
    return facts | {"queries": {"charged": 50_000}, "test_pictures": 10_000, **figures, **more}


def test_every_file_is_a_row_in_the_order_and_every_row_has_settings_that_the_agent_takes() -> None:
    assert {path.stem for path in rows.FOLDER.glob("*.toml")} == set(rows.ORDER)
    for name in rows.ORDER:
        row = rows.read(name)
        config = build_config(rows.merged({"images": row.dataset}, row.run))
        assert config.student in registry.CLASSIFIERS
        assert row.seeds == (0, 1, 2) and row.answers in ("soft", "hard") and row.reference in ("", "labels", "views")
        assert row.queries <= config.budget == 50_000


def test_preset_is_what_its_row_measures() -> None:
    row, preset = rows.read("cifar10-diffusion-generations"), preset_layer("photographs")
    assert rows.merged(preset, {"distill": {"balance_pictures": True}}) == {
        section: row.run[section] for section in ("deprivatize", "distill")
    }


def test_row_on_anothers_answers_has_its_settings_underneath_and_its_text_in_the_digest() -> None:
    below, above = rows.read("mnist-soft"), rows.read("mnist-kl-only")
    assert above.dataset == "mnist" and above.run["distill"] == {**below.run["distill"], "image_weight": 0}
    assert below.text in above.text
    assert accuracy.facts_of(above, 0)["config_digest"] != accuracy.facts_of(below, 0)["config_digest"]


def test_row_with_an_unknown_setting_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "FOLDER", tmp_path)
    (tmp_path / "odd.toml").write_text('dataset = "mnist"\nseeds = [0]\nsede = 1\n')
    with pytest.raises(ValueError, match=r"odd\.toml: expected some of .*got sede"):
        rows.read("odd")


def test_finished_cell_is_known_and_one_of_other_settings_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    row = rows.read("mnist-hard")
    written = [accuracy.facts_of(row, 0), accuracy.facts_of(row, 1) | {"config_digest": "of other settings"}]
    (tmp_path / "accuracy.jsonl").write_text("".join(json.dumps(facts) + "\n" for facts in written))
    assert accuracy.done(row, 0) and not accuracy.done(row, 1) and not accuracy.done(row, 2)
    # Settings that the row leaves to the agent, under another default: one that is no matter, one that is.
    for default, is_done in (({"wait_seconds": 5.0}, True), ({"distill": {"warmup_fraction": 0.2}}, False)):
        monkeypatch.setattr(rows, "build_config", lambda layer, default=default: build_config(layer, default))
        assert accuracy.done(row, 0) == is_done
    del written[0]["settings_digest"]  # of before lines said it
    (tmp_path / "accuracy.jsonl").write_text(json.dumps(written[0]) + "\n")
    assert accuracy.done(row, 0)


def test_hard_rows_train_on_what_a_label_only_account_gets() -> None:
    rng = np.random.default_rng(0)
    probabilities_NK = rng.dirichlet(np.ones(10), 500).astype(np.float32)
    probabilities_NK[:50] = np.round(probabilities_NK[:50], 1)  # with ties
    probabilities_NK /= probabilities_NK.sum(axis=1, keepdims=True)
    pool = Pool(
        images_NCHW=torch.zeros(500, 1, 8, 8, dtype=torch.uint8),
        latents_NL=torch.empty(500, 0),
        probabilities_NK=torch.from_numpy(probabilities_NK),
    )
    sold = policy.apply(Terms(answers="hard"), probabilities_NK)
    sold_N = codec.decode_answer(sold, picture_count=500, class_count=10)
    hardened = pool.hardened()
    assert hardened.class_indices_N is not None and hardened.class_indices_N.tolist() == sold_N.tolist()
    assert hardened.hardened() is hardened


def test_table_names_means_extremes_and_what_is_unfinished() -> None:
    risk: dict[str, Any] = {
        "privacy": {"membership_auc": 0.507, "membership_attacks": {"nearest": {}, "mean_of_parts": {}}},
        "bytes": {"sent": 9_000_000, "received": 2_000_000},
    }
    measured = [
        {"no": "row"},
        line("mnist-soft", 0, 0.5),
        line("mnist-soft", 0, 0.99, **risk),
        line("mnist-soft", 2, 0.992),
        line("mnist-soft", 1, 0.5) | {"config_digest": "of former settings"},
    ]
    lines = accuracy_table.present(measured)
    assert "in mind: `mnist-soft` 2." in accuracy_table.former(measured)
    assert accuracy_table.former(list(lines.values())) == ""
    told = accuracy_table.table(lines)
    assert "| 2 of 3 | 50,000 | 99.50 | **99.10** (99.00 to 99.20) |" in told and "| 11.0 MB | 0.507 |" in told
    del risk["privacy"]["membership_attacks"]["mean_of_parts"]  # a former version's line
    assert "| 0.507 whole |" in accuracy_table.table(lines)
    aimed = accuracy_table.aims(lines)
    assert "| 99.40 accuracy | 99.10 by `mnist-soft` (2 of 3 seeds) |" in aimed and "| not measured |" in aimed
    assert accuracy_table.aims(lines | {("mnist-10k", 0): line("mnist-10k", 0, 0.992)}).count("**99.20**") == 1
    worse, better = (np.packbits(np.arange(400) % n != 1).tobytes().hex() for n in (2, 4))
    for teacher, student, shown in (
        (worse, better, r"\| \*\*\+\d+\.\d+ at least\*\* by"),
        (better, worse, r"\| -\d+\.\d+ at least by"),
    ):
        cell = line("mnist-digits", 0, 0.5, right={"teacher": teacher, "student": student}) | {"test_pictures": 400}
        assert re.search(shown, accuracy_table.aims({("mnist-digits", 0): cell}))
    left = accuracy_table.unfinished(lines)
    assert "| `python -m benchmarks.accuracy --row mnist-soft` | 1 |" in left
    assert "| `python -m benchmarks.accuracy --row mnist-10k` | 0, 1, 2 |" in left
    assert accuracy_table.curve(lines) is None
    more = accuracy_table.present([*lines.values(), line("mnist-10k", 0, 0.98) | {"queries": {"charged": 10_000}}])
    picture = accuracy_table.curve(more)
    assert picture is not None and picture.count("<circle") == 3 and ">10K<" in picture


def test_row_on_anothers_answers_buys_them_without_training_that_rows_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(rows, "FOLDER", tmp_path)
    monkeypatch.setattr(accuracy, "RUNS", tmp_path / "runs" / "accuracy")
    below = (
        'dataset = "mnist-digits"\nseeds = [0]\n[run]\nbudget = 96\nstudent = "resnet8"\n'
        "[run.deprivatize]\nsteps = 2\n[run.distill]\npasses = 1\nimage_weight = 0\n"
    )
    (tmp_path / "below.toml").write_text(below)
    (tmp_path / "above.toml").write_text('of = "below"\nseeds = [0]\n')
    (tmp_path / "part.toml").write_text('of = "below"\nseeds = [0]\nqueries = 64\nanswers = "hard"\n')
    torch.manual_seed(0)
    teacher = registry.build("resnet8", class_count=10, channels=1).eval()
    save_model(tmp_path / "teacher.pt", teacher, resnet8_facts(32, labels="0123456789"))
    monkeypatch.setattr(accuracy, "teacher_of", lambda *_: tmp_path / "teacher.pt")
    measured = accuracy.measure(rows.read("above"), 0, tmp_path)
    assert measured["queries"] == {"charged": 96, "pool": 96} and measured["ledger"]["debited"] == 96
    assert measured["bytes"]["sent"] > 0 and 0 <= measured["privacy"]["membership_auc"] <= 1
    part = accuracy.measure(rows.read("part"), 0, tmp_path)
    assert part["pool_digest"] == measured["pool_digest"]
    assert part["queries"] == {"charged": 64, "pool": 96} and part["ledger"]["debited"] == 96
    assert "bytes" not in part and "privacy" not in part  # those of all 96, with probabilities
    bought = tmp_path / "runs" / "accuracy" / "below-0"
    assert (bought / "generator.pt").exists() and not (bought / "student.pt").exists()

    taught = 'of = "below"\nseeds = [0]\n[run.distill]\nassistant = "resnet8"\nassistant_passes = 1\n'
    (tmp_path / "taught.toml").write_text(taught)
    (tmp_path / "longer.toml").write_text(taught + "passes = 2\n")
    assert accuracy.measure(rows.read("taught"), 0, tmp_path)["seconds"]["assistant"] > 0
    monkeypatch.setattr(training, "train_assistant", None)  # another row's assistant learns the same
    accuracy.measure(rows.read("longer"), 0, tmp_path)
    assert len(list(bought.parent.glob("below-0-assistants-*"))) == 1


def test_paired_bootstrap_excludes_zero_only_for_a_difference_that_is_there() -> None:
    def cell(seed: int, teacher_N: Any, student_N: Any) -> dict[str, Any]:
        right = {"teacher": np.packbits(teacher_N).tobytes().hex(), "student": np.packbits(student_N).tobytes().hex()}
        return {"seed": seed, "right": right, "test_pictures": len(teacher_N)}

    teacher_N = np.arange(500) % 10 != 0  # 90 %
    better_N = teacher_N | (np.arange(500) % 20 == 0)  # 95 %
    low, middle, high = accuracy_table.difference([cell(seed, teacher_N, better_N) for seed in range(3)])
    assert middle == pytest.approx(0.05) and 0.03 < low < middle < high < 0.08
    uneven = accuracy_table.difference([cell(0, teacher_N, better_N), cell(1, teacher_N, teacher_N)])
    assert uneven[0] == 0 and uneven[2] > 0.04  # seeds differ more than pictures do
    swapped_N = np.roll(teacher_N, 1)  # as good, wrong elsewhere
    low, middle, high = accuracy_table.difference([cell(0, teacher_N, swapped_N)])
    assert middle == 0 and low < 0 < high


def test_pen_digits_for_the_test_are_none_of_the_devices(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    test = datasets.part("mnist-digits", tmp_path, "test")
    folder = datasets.pen_digits_folder(tmp_path / "pen-digits")
    assert test.images_NCHW.shape == (500, 1, 32, 32) and len(set(test.labels_N.tolist())) == 10
    files = sorted(folder.iterdir())
    assert len(files) == 1797 - 500
    with pytest.raises(ValueError, match="got device of mnist-digits"):
        datasets.part("mnist-digits", tmp_path, "device")


def test_cifar10_is_read_by_class_and_name_and_the_device_has_none_of_the_test(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "cifar10" / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (label * 100, 0, 0)).save(tmp_path / "cifar10" / part / name / "0.png")
    test = datasets.part("cifar10", tmp_path, "test")
    assert test.labels_N.tolist() == [0, 1] and test.images_NCHW[:, 0, 0, 0].tolist() == [0, 100]
    assert datasets.cifar10_root(tmp_path, unpacked=tmp_path / "unpacked") == tmp_path
    with pytest.raises(OSError, match=r"expected .*cifar10 or .*cifar10-jpeg\.tar\.xz"):
        datasets.cifar10_root(tmp_path / "elsewhere", unpacked=tmp_path / "unpacked")


def test_real_views_are_bought_once_from_a_real_server_and_counted_by_its_ledger(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = registry.build("resnet8", class_count=3, channels=1).eval()
    save_model(tmp_path / "teacher.pt", model, resnet8_facts(16))
    images_NCHW = np.random.default_rng(0).integers(0, 256, (24, 1, 16, 16), dtype=np.uint8)
    asked: dict[str, Any] = {"teacher": tmp_path / "teacher.pt", "mirror": False, "seed": 0, "folder": tmp_path}
    pool, queries = references.views(images_NCHW, budget=120, **asked)
    assert queries == {"charged": 120} and len(pool) == 120
    looked = correct(tmp_path / "teacher.pt", datasets.Labelled(pool.images_NCHW.numpy(), np.zeros(120, np.int64)))
    assert pool.probabilities_NK is not None
    assert pool.probabilities_NK.argmax(1).tolist() == looked.classes_N.tolist()
    (kept,) = tmp_path.glob("answers-*.npy")
    kept.unlink()  # as if interrupted before they were kept: asked again, paid for once
    again, queries = references.views(images_NCHW, budget=120, **asked)
    assert queries == {"charged": 120}
    assert torch.equal(again.probabilities_NK, pool.probabilities_NK)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected at least 120, got 119"):
        references.views(images_NCHW, budget=119, **asked)
