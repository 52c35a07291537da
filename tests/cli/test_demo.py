"""`tracer demo`: real digits from the package, found flips, and what happens without matplotlib."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from cli_cases import printed_json, refused, run_tracer

from tracer.cli.demo_digits import Settings, digits, run

QUICK = ["demo", "--quick", "--epochs", "8", "--proj-dim", "64", "--output-dir", "out"]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = digits.read_digits()
    wanted = datasets.load_digits()
    assert np.array_equal(images, wanted.images)
    assert np.array_equal(labels, wanted.target)


def test_a_tenth_of_the_labels_is_flipped_and_no_more():
    data = digits.load_data(Settings.for_demo())
    pixels, labels = digits.read_digits()
    of_pixels = {(image / 16).astype(np.float32).tobytes(): label for image, label in zip(pixels, labels, strict=True)}
    true = np.array([of_pixels[image.numpy().tobytes()] for image in data.train_images])
    assert np.array_equal(data.train_labels.numpy() != true, data.flipped)
    assert data.flipped.sum() == 130
    assert np.array_equal(data.test_labels, [of_pixels[image.numpy().tobytes()] for image in data.test_images])


def test_the_demo_finds_flipped_labels_far_better_than_chance_without_matplotlib(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "PIL", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    before = torch.get_rng_state()
    found = printed_json(*QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    assert found["flipped"] == 50
    assert found["found"]["self-influence"][1] > 2 * 50 * 0.2
    again = run_tracer(*QUICK).output
    assert "Reusing the 4 checkpoints in out/checkpoints" in again
    assert "(without pictures. " in again
    assert "pip install tracin[report]" in again
    assert "Mislabelled digits" in (tmp_path / "out" / "report" / "index.html").read_text(encoding="utf-8")
    count = found["found"]["self-influence"][0]
    assert f"self-influence                      {count} ({count / 50:.0%})" in again
    assert run_tracer("top", "out/store", "--targets", "0", "-k", "2").exit_code == 0
    assert "holds checkpoints of other settings" in refused(*QUICK, "--seed", "1")


def test_the_demo_uses_one_thread_and_leaves_their_number_as_it_was(tmp_path, monkeypatch):
    used = []

    def train(*_):
        used.append(torch.get_num_threads())
        raise KeyError

    monkeypatch.setattr(digits, "train_or_reuse", train)
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError):
            run(Settings.for_demo(quick=True), tmp_path)
        assert (used, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(1)


def test_killed_training_is_begun_anew(tmp_path):
    settings = Settings(seed=0, flip_rate=0.1, num_train=40, num_test=5, epochs=2, batch_size=8)
    data, said = digits.load_data(settings), []
    first = digits.train_or_reuse(data, settings, tmp_path / "run", said.append)
    weights = first[-1][0].read_bytes()
    described = json.loads((tmp_path / "run" / "training.json").read_text())
    (tmp_path / "run" / "training.json").write_text(json.dumps({**described, "finished": False}))
    second = digits.train_or_reuse(data, settings, tmp_path / "run", said.append)
    assert second == first
    assert second[-1][0].read_bytes() == weights
    assert said == ["Training 2 epochs ..."] * 2


def test_a_share_of_flips_that_makes_no_sense_is_refused():
    assert "flip_rate is 0.9; expected 0.01 to 0.5" in refused("demo", "--flip-rate", "0.9")
