"""The examples on images: their readers of data sets, their networks, and their quick modes."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from example_runs import example, newest, run_example
from torch import nn

pytest.importorskip("PIL")
vision_data, vision_models = example("vision_data"), example("vision_models")


def write_idx(path, values: np.ndarray) -> None:
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def random_images(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST/raw"), ("fashion-mnist", ""), ("mnist", "mnist")])
def test_mnist_files_are_read_wherever_they_usually_lie(tmp_path, name, folder, ending):
    place = tmp_path / folder
    place.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 7), ("t10k", 3)):
        write_idx(place / f"{part}-images-idx3-ubyte{ending}", random_images(count, 28, 28))
        write_idx(place / f"{part}-labels-idx1-ubyte{ending}", np.arange(count) % 10)
    data = vision_data.load_vision(name, tmp_path)
    assert np.array_equal(data.train_images[..., 0], random_images(7, 28, 28))
    assert np.array_equal(data.test_images[..., 0], random_images(3, 28, 28))
    assert data.train_labels.tolist() == list(range(7)) and data.test_labels.dtype == np.int64
    assert data.class_names[1] == ("1" if name == "mnist" else "trouser")


def test_an_idx_file_that_is_cut_short_is_an_error(tmp_path):
    path = tmp_path / "train-labels-idx1-ubyte"
    write_idx(path, np.arange(9))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="cut short"):
        vision_data.read_idx(path)
    path.write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match="no idx file"):
        vision_data.read_idx(path)


def cifar_rows(count: int) -> tuple[np.ndarray, list[int]]:
    """Pixels as CIFAR-10's files have them: all of a row's reds, then greens, then blues."""
    return random_images(count, 3072), [row % 10 for row in range(count)]


@pytest.mark.parametrize("kind", ["py", "bin"])
def test_both_forms_of_cifar10_are_read(tmp_path, kind):
    folder = tmp_path / f"cifar-10-batches-{kind}"
    folder.mkdir()
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        pixels, labels = cifar_rows(number + 1)
        if kind == "py":
            (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2))
        else:
            (folder / f"{name}.bin").write_bytes(np.column_stack([np.uint8(labels), pixels]).tobytes())
    data = vision_data.load_vision("cifar10", tmp_path)
    assert data.train_images.shape == (15, 32, 32, 3) and data.test_images.shape == (6, 32, 32, 3)
    pixels, labels = cifar_rows(6)
    assert data.test_labels.tolist() == labels
    for channel, start in enumerate((0, 1024, 2048)):
        assert np.array_equal(data.test_images[2, ..., channel].ravel(), pixels[2, start : start + 1024])


def test_pickles_of_python_2_are_read(tmp_path):
    # as CIFAR-10's are: text is bytes, and numpy's module has its old name
    pickled = pickle.dumps({b"data": np.array([[5, 6]], np.uint8), b"labels": [3, 4]}, protocol=2)
    old = pickled.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "data_batch_1").write_bytes(old)
    held = vision_data.read_array_pickle(tmp_path / "data_batch_1")
    assert held["data"].tolist() == [[5, 6]] and held["labels"] == [3, 4]


class Harmful:
    """Its pickle asks for os.mkdir to be called while it is read."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_asks_for_a_call_is_refused_and_nothing_is_called(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Harmful(tmp_path / "made")}))
    with pytest.raises(pickle.UnpicklingError, match="mkdir, which no array needs"):
        vision_data.read_array_pickle(tmp_path / "data_batch_1")
    assert not (tmp_path / "made").exists()


def test_the_small_cifar10_is_taken_where_there_is_no_other(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    arrays = {"x_train": random_images(5, 32, 32, 3), "y_train": np.arange(5), "x_test": random_images(2, 32, 32, 3)}
    np.savez(tmp_path / "cifar10_10k.npz", **arrays, y_test=np.arange(2))
    monkeypatch.setenv("TRACER_DATA", str(tmp_path))
    assert np.array_equal(vision_data.load_vision("auto", None).train_images, arrays["x_train"])
    monkeypatch.setenv("TRACER_DATA", str(tmp_path / "nowhere"))
    assert vision_data.load_vision("auto", None).name == "digits"
    with pytest.raises(SystemExit, match="cifar10 was not found in no folder"):
        vision_data.load_vision("cifar10", None)


def test_tensors_are_standardized_by_the_training_images():
    pytest.importorskip("sklearn")
    train, test = vision_data.load_vision("digits", None).subset(300, 40, 0).tensors()
    assert train.shape == (300, 1, 8, 8) and test.shape == (40, 1, 8, 8)
    assert abs(float(train.mean())) < 1e-5 and abs(float(train.std()) - 1) < 1e-3


@pytest.mark.parametrize(
    ("name", "layers", "parameters"), [("resnet9", 9, 6573130), ("resnet23", 23, 97482), ("resnet56", 56, 853018)]
)
def test_networks_have_the_layers_that_their_names_say(name, layers, parameters):
    model = vision_models.build_model(name, 10)
    assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()) == layers
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    for size in (8, 28, 32):
        small = vision_models.build_model(name, 10, channels=1, width=4).eval()
        assert small(torch.zeros(2, 1, size, size)).shape == (2, 10)
    with pytest.raises(ValueError, match="resnet9"):
        vision_models.build_model("resnet10", 10)


def test_shuffled_labels_are_found_in_stages_that_resume(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    arguments = ["--quick", "--shuffle-label", "--output-dir", str(tmp_path / "run")]
    trained = run_example("shuffled_labels", *arguments, "--stages", "train")
    assert "40 labels are shuffled" in trained and not (tmp_path / "run" / "store").exists()
    run_example("shuffled_labels", *arguments, "--stages", "self-influence")
    written = newest(tmp_path / "run" / "store" / "checkpoints")
    last = run_example("shuffled_labels", *arguments)
    assert "Reusing" in last and newest(tmp_path / "run" / "store" / "checkpoints") == written
    with (tmp_path / "run" / "shuffled_labels.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 40 and all(line["true_label"] != line["given_label"] for line in lines)
    recall = json.loads((tmp_path / "run" / "analysis.json").read_text())["recall"]["self-influence"]
    assert recall["0.2"] > 0.4
    assert (tmp_path / "run" / "report" / "index.html").exists()


def test_stages_that_lack_the_one_before_say_so(tmp_path):
    pytest.importorskip("sklearn")
    shuffled = example("shuffled_labels")
    with pytest.raises(SystemExit, match="stage train first"):
        shuffled.main(["--quick", "--stages", "analysis", "--output-dir", str(tmp_path)])


def test_results_of_other_settings_are_refused(tmp_path):
    run_directory = example("run_directory")
    run_directory.claim_directory(tmp_path / "run", {"seed": 0, "sizes": (1, 2)})
    run_directory.claim_directory(tmp_path / "run", {"seed": 0, "sizes": [1, 2]})
    with pytest.raises(SystemExit, match="seed 0, now 1"):
        run_directory.claim_directory(tmp_path / "run", {"seed": 1, "sizes": (1, 2)})


def test_an_image_folder_is_traced_from_scratch_and_from_weights(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    first = run_example("image_folder", "--quick", "--output-dir", str(tmp_path / "run"))
    assert "120 training and 20 test images of 10 classes" in first
    weights = sorted((tmp_path / "run" / "checkpoints").glob("*.safetensors"))[-1]
    data = ["--data-dir", str(tmp_path / "run" / "images"), "--model-path", str(weights)]
    second = run_example("image_folder", "--quick", *data, "--output-dir", str(tmp_path / "other"))
    assert "epoch" not in second
    accuracies = [next(line for line in text.splitlines() if "accuracy" in line) for text in (first, second)]
    assert accuracies[0] == accuracies[1]


def test_folders_without_classes_and_broken_images_are_errors(tmp_path):
    rows = example("image_rows")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="one for each class"):
        rows.find_images(tmp_path, 0)
    with pytest.raises(SystemExit, match="cannot be read"):
        rows.ImageRows([tmp_path / "dog" / "1.png"], [0], 8)[0]


def test_a_folder_that_is_divided_keeps_its_parts(tmp_path):
    rows = example("image_rows")
    for part, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / part / name / f"{number}.JPG").touch()
    folder = rows.find_images(tmp_path, 0)
    assert (
        folder.class_names == ["cat", "dog"]
        and folder.train[1] == [0, 0, 0, 1, 1, 1]
        and folder.test[1] == [0, 0, 1, 1]
    )
    assert all("val" in path.parts for path in folder.test[0])


def test_images_are_cut_to_their_middle_square(tmp_path):
    from PIL import Image

    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, 5:15] = 255  # the middle square is white
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    rows = example("image_rows").ImageRows([tmp_path / "wide.png"], [1], 10)
    assert (rows.pixels(0) == 255).all() and rows[0][1] == 1
    assert torch.allclose(
        rows[0][0][:, 0, 0], torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    )


def test_weights_of_another_network_are_refused(tmp_path):
    image_folder = example("image_folder")
    model = image_folder.build_model(3, narrow=True)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="of another network"):
        image_folder.load_pretrained(model, str(tmp_path / "other.pt"))
    torch.save(image_folder.build_model(5, narrow=True).state_dict(), tmp_path / "five.pt")
    assert image_folder.load_pretrained(model, str(tmp_path / "five.pt")) is False  # its head is for five classes
    torch.save(model.state_dict(), tmp_path / "three.pt")
    assert image_folder.load_pretrained(model, str(tmp_path / "three.pt")) is True


def test_training_that_was_cut_short_goes_on_to_the_same_weights(tmp_path):
    training = example("recorded_training")
    rows = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.arange(20) % 2)
    settings = {"epochs": 4, "batch_size": 6, "learning_rate": 0.1, "keep": 5}

    def make():
        torch.manual_seed(0)
        return nn.Linear(3, 2)

    whole = training.train_or_reuse(make(), rows, tmp_path / "whole", **settings)
    calls = []

    def cut_short(output, labels):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(output, labels)

    with pytest.raises(KeyboardInterrupt):
        training.train_or_reuse(make(), rows, tmp_path / "cut", loss=cut_short, **settings)
    mended = training.train_or_reuse(make(), rows, tmp_path / "cut", **settings)
    assert [(path.name, rate) for path, rate in mended] == [(path.name, rate) for path, rate in whole]
    for (ours, _), (theirs, _) in zip(mended, whole, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
