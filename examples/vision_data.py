"""Small image data sets for the examples: MNIST, Fashion-MNIST and CIFAR-10 from their standard files, and digits.

Nothing is downloaded. Standard files are looked for under a folder of yours:

- MNIST and Fashion-MNIST: ``train-images-idx3-ubyte`` and its three companions, gzipped or not;
- CIFAR-10: ``cifar-10-batches-py`` (pickles, read by an unpickler that makes arrays and nothing else) or
  ``cifar-10-batches-bin``.

Without them CIFAR-10 comes from ``cifar10_10k.npz`` in the folder that the environment variable ``TRACER_DATA`` names,
10,000 training and 2,000 test images. scikit-learn's handwritten digits (8 by 8 pixels) are always there.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DIGIT_NAMES = tuple("0123456789")
FASHION_NAMES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

IDX_FOLDERS = {
    "mnist": ("", "MNIST/raw", "mnist", "MNIST"),
    "fashion-mnist": ("", "FashionMNIST/raw", "fashion-mnist", "fashion", "fashion_mnist"),
}
"""The paths of the files of each data set under a data folder; torchvision has them in the second place."""

DATASETS = ("auto", "mnist", "fashion-mnist", "cifar10", "digits")


@dataclass(frozen=True)
class VisionData:
    """Images and labels.

    Attributes:
        name: Which data set it is, and where it came from.
        train_images: ``[N, H, W, C]``, uint8.
        train_labels: ``[N]``, int64.
        test_images: ``[M, H, W, C]``, uint8.
        test_labels: ``[M]``, int64.
        class_names: The name of each class index.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]

    def subset(self, num_train: int | None, num_test: int | None, seed: int) -> VisionData:
        """Return some of the rows, drawn at random.

        Args:
            num_train: How many training rows; None, or more than there are: all.
            num_test: How many test rows.
            seed: Of the choice.

        Returns:
            The data set of these rows, in their old order.
        """
        rng = np.random.default_rng(seed)
        train = np.sort(rng.permutation(len(self.train_labels))[:num_train])
        test = np.sort(rng.permutation(len(self.test_labels))[:num_test])
        return replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
        )

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return the training and test images as a model takes them: ``[N, C, H, W]`` float32.

        Each channel has mean 0 and standard deviation 1 over the training images.
        """
        mean = self.train_images.mean(axis=(0, 1, 2), dtype=np.float64)
        spread = self.train_images.std(axis=(0, 1, 2), dtype=np.float64)

        def scaled(images: np.ndarray) -> Tensor:
            values = ((images - mean) / spread).astype(np.float32)  # [N, H, W, C]
            return torch.as_tensor(np.ascontiguousarray(values.transpose(0, 3, 1, 2)))  # [N, C, H, W]

        return scaled(self.train_images), scaled(self.test_images)


def load_vision(dataset: str, data_dir: Path | None) -> VisionData:
    """Return a data set by its name.

    Args:
        dataset: One of `DATASETS`; ``auto`` is the first of CIFAR-10, MNIST, Fashion-MNIST and digits that exists.
        data_dir: A directory of standard files.

    Returns:
        The data set.

    Raises:
        SystemExit: It is not there; the message says where it was looked for.
    """
    loaders: dict[str, Callable[[], VisionData | None]] = {
        "cifar10": lambda: _cifar10(data_dir),
        "mnist": lambda: _idx("mnist", data_dir),
        "fashion-mnist": lambda: _idx("fashion-mnist", data_dir),
        "digits": _digits,
    }
    for name, load in loaders.items():
        if dataset in ("auto", name):
            found = load()
            if found is not None:
                return found
    looked_in = "no folder (pass --data-dir)" if data_dir is None else str(data_dir)
    raise SystemExit(
        f"{dataset} was not found in {looked_in}. Put its standard files there (see {Path(__file__).name}), or pass "
        f"--dataset digits, which is always there."
    )


def read_idx(path: Path) -> np.ndarray:
    """Return the array of unsigned bytes that an idx file holds, gzipped or not.

    Args:
        path: The file.

    Returns:
        uint8, with the file's shape.

    Raises:
        ValueError: It is no idx file of bytes, or is cut short.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of unsigned bytes: it begins with {content[:4]!r}.")
    num_axes = content[3]
    shape = tuple(np.frombuffer(content, ">u4", num_axes, offset=4).astype(int))
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} announces {shape} and has {values.size} bytes; it is cut short: fetch it again.")
    return values.reshape(shape)


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of dicts, lists, numbers, strings and numpy arrays; anything else in them is an error.

    A pickle may name any function of any module to be called while it is read. This one finds four names only.
    """

    _ALLOWED = (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"))

    def find_class(self, module: str, name: str) -> object:
        """Return what a pickle names, if it takes part in making an array.

        Args:
            module: The module.
            name: The name in it.

        Returns:
            The class or function.

        Raises:
            UnpicklingError: It is none of those.
        """
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # under either name: numpy 2 renamed the module
        raise pickle.UnpicklingError(
            f"the pickle asks for {module}.{name}, which no array needs; it was not called. This is no CIFAR-10 batch."
        )


def read_array_pickle(path: Path) -> dict[str, np.ndarray | list[int]]:
    """Return the dict in a batch of CIFAR-10, without executing anything that it may ask for.

    Args:
        path: A file such as ``data_batch_1``.

    Returns:
        Keys as text, values as they are.

    Raises:
        UnpicklingError: It asks for something that is not needed to make arrays.
    """
    held = ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in held.items()}


def _idx(name: str, data_dir: Path | None) -> VisionData | None:
    """Return MNIST or Fashion-MNIST, or None where one of the four files is missing."""
    if data_dir is None:
        return None
    for folder in IDX_FOLDERS[name]:
        parts = [
            _idx_file(data_dir / folder, part, kind) for part in ("train", "t10k") for kind in ("images", "labels")
        ]
        if all(part is not None for part in parts):
            train_x, train_y, test_x, test_y = (read_idx(part) for part in parts if part is not None)
            names = DIGIT_NAMES if name == "mnist" else FASHION_NAMES
            labels = train_y.astype(np.int64), test_y.astype(np.int64)
            return VisionData(name, train_x[..., None], labels[0], test_x[..., None], labels[1], names)
    return None


def _idx_file(folder: Path, part: str, kind: str) -> Path | None:
    axes = 3 if kind == "images" else 1
    names = [f"{part}-{kind}{mark}idx{axes}-ubyte{ending}" for mark in "-." for ending in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).exists()), None)


def _cifar10(data_dir: Path | None) -> VisionData | None:
    """Return CIFAR-10 from its standard files, else from ``cifar10_10k.npz``, else None."""
    for base in () if data_dir is None else (data_dir, data_dir / "cifar10", data_dir / "CIFAR10"):
        for folder, ending in ((base / "cifar-10-batches-py", ""), (base / "cifar-10-batches-bin", ".bin")):
            paths = [folder / f"{name}{ending}" for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")]
            if all(path.exists() for path in paths):
                batches = [_cifar_batch(path) for path in paths]
                images, labels = (np.concatenate([batch[part] for batch in batches[:-1]]) for part in (0, 1))
                return VisionData("cifar10", images, labels, *batches[-1], CIFAR10_NAMES)
    small = Path(os.environ.get("TRACER_DATA", ".")) / "cifar10_10k.npz"
    if not small.exists():
        return None
    with np.load(small, allow_pickle=False) as held:
        train, test = ((held[f"x_{part}"], held[f"y_{part}"]) for part in ("train", "test"))
    return VisionData("cifar10 (cifar10_10k.npz)", *train, *test, CIFAR10_NAMES)


def _cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images ``[n, 32, 32, 3]`` and labels ``[n]`` of one file."""
    if path.suffix == ".bin":
        records = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
        pixels, labels = records[:, 1:], records[:, 0].astype(np.int64)
    else:
        held = read_array_pickle(path)
        pixels, labels = np.asarray(held["data"], np.uint8), np.asarray(held["labels"], np.int64)
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels  # [n, 3, 32, 32] to [n, 32, 32, 3]


def _digits() -> VisionData:
    """Return scikit-learn's digits, the first 1,297 for training."""
    from sklearn.datasets import load_digits  # not needed where standard files are

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # [1797, 8, 8, 1]
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1297], order[1297:]
    return VisionData("digits", images[train], labels[train], images[test], labels[test], DIGIT_NAMES)
