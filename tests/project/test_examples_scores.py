"""The examples on tables, weights, ensembles, processes and data selection, in their quick modes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from example_runs import example, newest, run_example

pytest.importorskip("sklearn")


def test_a_folder_of_weights_gives_a_matrix_that_is_that_of_the_formula(tmp_path):
    arguments = ["--quick", "--output-dir", str(tmp_path)]
    printed = run_example("weights_folder", *arguments)
    assert "tracin.npy: 400 train rows x 50 targets" in printed
    assert [name in printed for name in ("epoch_2.pt (lr 0.05), epoch_4.pt", "epoch_8.pt (lr 0.05), epoch_12.pt")] == [
        True
    ] * 2
    assert np.load(tmp_path / "tracin.npy").shape == (400, 50)
    written = newest(tmp_path / "store")
    assert "Training" not in run_example("weights_folder", *arguments)
    assert newest(tmp_path / "store") == written


SETUP = """
import torch

def build():
    return torch.nn.Linear(3, 2)

def rows():
    return torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 0, 1])
"""


def test_functions_of_ones_own_are_named_by_module(tmp_path, monkeypatch):
    (tmp_path / "mine_of_the_test.py").write_text(SETUP)
    monkeypatch.syspath_prepend(tmp_path)
    weights_folder = example("weights_folder")
    for epoch in (10, 9):
        (tmp_path / "weights").mkdir(exist_ok=True)
        torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "weights" / f"{epoch}.pt")
    mine = [
        f"--{name}=mine_of_the_test:{part}"
        for name, part in (("model", "build"), ("train", "rows"), ("targets", "rows"))
    ]
    folders = ["--weights-dir", str(tmp_path / "weights"), "--output-dir", str(tmp_path / "run")]
    weights_folder.main([*folders, *mine, "--learning-rate", "0.1", "0.2"])
    assert np.load(tmp_path / "run" / "tracin.npy").shape == (4, 4)
    found = weights_folder.weights_in_order(tmp_path / "weights", "*.pt")
    assert [path.name for path in found] == ["9.pt", "10.pt"]
    with pytest.raises(SystemExit, match="3 learning rates came for 2 files"):
        weights_folder.main([*folders, *mine, "--learning-rate", "1", "2", "3"])
    with pytest.raises(SystemExit, match="package.module:function"):
        weights_folder.named_function("mine_of_the_test:nothing")
    with pytest.raises(SystemExit, match="no file"):
        weights_folder.weights_in_order(tmp_path, "*.pt")


def test_a_wrong_count_of_learning_rates_is_refused_before_training(tmp_path):
    with pytest.raises(SystemExit, match="2 learning rates came for 5 files"):
        example("weights_folder").main(["--learning-rate", "0.1", "0.2", "--output-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_an_ensemble_predicts_better_than_one_model(tmp_path):
    arguments = ["--quick", "--output-dir", str(tmp_path)]
    assert "Training 5 models" in run_example("trak_ensemble", *arguments)
    graded = json.loads((tmp_path / "lds.json").read_text())
    assert graded["trak"]["5"] > graded["trak"]["1"] and set(graded["influence"]) == {"1", "2", "5"}
    written = newest(tmp_path / "store"), newest(tmp_path / "models")
    assert "Training 5 models" not in run_example("trak_ensemble", *arguments)
    assert (newest(tmp_path / "store" / "checkpoints"), newest(tmp_path / "models")) <= written


def test_two_processes_give_what_one_gives(tmp_path):
    printed = run_example("torchrun_digits", "--quick", "--output-dir", str(tmp_path))
    assert "process 0 of 2: rows 0 to 127" in printed and "process 1 of 2: rows 128 to 255" in printed
    one, two = (np.load(tmp_path / f"scores_{count}.npy") for count in (1, 2))
    assert one.shape == (256, 20) and np.abs(one - two).max() <= 1e-5 * np.abs(one).max()


def test_selected_rows_beat_random_ones(tmp_path):
    arguments = ["--quick", "--output-dir", str(tmp_path)]
    run_example("data_selection", *arguments)
    accuracies = json.loads((tmp_path / "accuracies.json").read_text())
    assert np.mean(accuracies["top by influence, each class"]) > np.mean(accuracies["random"])
    assert len(accuracies["random"]) == 6
    written = newest(tmp_path / "store" / "checkpoints")
    run_example("data_selection", *arguments)
    assert newest(tmp_path / "store" / "checkpoints") == written


def test_choices_have_the_size_that_was_asked_for_and_the_same_share_of_each_class():
    data_selection = example("data_selection")
    labels = np.repeat([0, 1], [60, 40])
    names, masks = data_selection.choose({"score": np.arange(100.0)}, labels, 0.5, 2, 0)
    assert names == ["score", "score, each class", "random", "random", "the whole pool"]
    assert masks.sum(1).tolist() == [50, 50, 50, 50, 100]
    assert np.flatnonzero(masks[0]).tolist() == list(range(50, 100))
    assert np.flatnonzero(masks[1]).tolist() == [*range(30, 60), *range(80, 100)]


@pytest.mark.parametrize("loss", ["squared", "huber"])
def test_corrupted_targets_of_a_table_are_found(tmp_path, loss):
    arguments = ["--quick", "--loss", loss, "--output-dir", str(tmp_path)]
    printed = run_example("tabular_regression", *arguments)
    assert "self-influence" in printed and ("retrained" in printed) == (loss == "squared")
    again = run_example("tabular_regression", *arguments)
    assert "Reusing" in again and again[again.index("Test rows") :] == printed[printed.index("Test rows") :]


def test_a_table_without_corrupted_targets_lists_what_ranks_highest(tmp_path):
    arguments = ["--quick", "--rows", "24", "--epochs", "1", "--output-dir", str(tmp_path)]
    printed = run_example("tabular_regression", "--corrupt", "0", *arguments)
    assert "No target was corrupted. Training rows of the highest self-influence" in printed
    assert "corrupted targets found" not in printed


def test_a_table_of_the_fewest_rows_is_traced(tmp_path):
    printed = run_example("tabular_regression", "--rows", "20", "--epochs", "2", "--output-dir", str(tmp_path))
    assert "15 rows of 10 columns, 2 with corrupted targets" in printed and "Without the 3 rows" in printed


def test_a_wrong_csv_file_does_not_claim_the_directory(tmp_path):
    path, run = tmp_path / "houses.csv", tmp_path / "run"
    path.write_text("\n".join(["rooms,price", *(f"{row},{2 * row}" for row in range(30))]))
    with pytest.raises(SystemExit, match="no column 'target'"):
        example("tabular_regression").main(["--csv", str(path), "--output-dir", str(run)])
    with pytest.raises(SystemExit, match="nothing.csv cannot be read as a CSV file"):
        example("tabular_regression").main(["--csv", str(tmp_path / "nothing.csv"), "--output-dir", str(run)])
    assert not run.exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rows", "5", "--rows must be 20 or more, for a quarter of them are test rows; got 5"),
        ("--corrupt", "0.5", "--corrupt must be 0 or in 0.01 to 0.4; got 0.5"),
        ("--epochs", "0", "--epochs must be 1 or more; got 0"),
    ],
)
def test_settings_of_a_table_are_checked(capsys, option, value, message):
    with pytest.raises(SystemExit):
        example("tabular_regression").parse([option, value])
    assert message in capsys.readouterr().err


def test_csv_files_are_read_and_gaps_left_out(tmp_path):
    tabular = example("tabular_regression")
    path = tmp_path / "houses.csv"
    lines = ["rooms,town,price", "1,Ulm,10", ",Ulm,11", *(f"{row},Bonn,{2 * row}" for row in range(30))]
    path.write_text("\n".join(lines))
    x, y, columns = tabular.read_csv(path, "price")
    assert columns == ["rooms"] and x.shape == (31, 1) and y[0] == 10
    with pytest.raises(SystemExit, match="no column 'prize'; it has rooms, town, price"):
        tabular.read_csv(path, "prize")
    path.write_text("rooms,price\n1,2\n")
    with pytest.raises(SystemExit, match="20 rows are needed"):
        tabular.read_csv(path, "price")
