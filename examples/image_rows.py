"""Images on disk as rows: one subfolder a class, read with Pillow when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from vision_data import VisionData

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
CHANNEL_MEAN, CHANNEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as pretrained weights expect


class ImageRows(Dataset):
    """Images as they are read from disk, when they are asked for.

    Args:
        paths: One file a row.
        labels: The class index of each.
        size: The side of the square that each is cut to.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], size: int) -> None:
        self.paths, self.labels, self.size = list(paths), list(labels), size

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.paths)

    def pixels(self, row: int) -> np.ndarray:
        """Return the middle square of an image, ``[size, size, 3]`` uint8.

        Args:
            row: Which.

        Returns:
            The pixels.

        Raises:
            SystemExit: Pillow cannot read the file.
        """
        try:
            with Image.open(self.paths[row]) as image:
                picture = image.convert("RGB")
        except OSError as error:
            raise SystemExit(f"{self.paths[row]} cannot be read ({error}); remove it or mend it.") from None
        scale = self.size / min(picture.size)
        width, height = (max(self.size, round(side * scale)) for side in picture.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(resized.crop((left, top, left + self.size, top + self.size)))

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Return an image ``[3, size, size]``, standardized, and its class index."""
        values = (self.pixels(row) / 255.0 - np.array(CHANNEL_MEAN)) / np.array(CHANNEL_STD)
        image = torch.as_tensor(values.transpose(2, 0, 1).astype(np.float32))  # [H, W, C] to [C, H, W]
        return image, self.labels[row]


class Folder(NamedTuple):
    """What was found under a folder.

    Attributes:
        class_names: The subfolders' names, sorted.
        train: Paths and class indices.
        test: Likewise.
    """

    class_names: list[str]
    train: tuple[list[Path], list[int]]
    test: tuple[list[Path], list[int]]


def find_images(directory: Path, seed: int, test_share: float = 0.2) -> Folder:
    """Return the images of a folder that has a subfolder a class, or ``train`` and ``test`` that have.

    Args:
        directory: The folder.
        seed: Of the split where the folder has none.
        test_share: Which share of each class is held out there.

    Returns:
        Class names and paths.

    Raises:
        SystemExit: There are fewer than two classes with images.
    """
    halves = [directory / "train", *(directory / name for name in ("test", "val", "valid", "validation"))]
    given = [half for half in halves if half.is_dir()]
    divided = len(given) >= 2 and given[0].name == "train"
    by_class = _images_by_class(given[0] if divided else directory)
    if len(by_class) < 2:
        raise SystemExit(
            f"{directory} has {len(by_class)} subfolders with images; expected one for each class, two at least, such "
            f"as {directory / 'dog'} and {directory / 'cat'}."
        )
    names, rng = sorted(by_class), np.random.default_rng(seed)
    train: tuple[list[Path], list[int]] = ([], [])
    test: tuple[list[Path], list[int]] = ([], [])
    held_out = _images_by_class(given[1]) if divided else {}
    for label, name in enumerate(names):
        paths = by_class[name]
        if not divided:
            order = rng.permutation(len(paths))
            cut = max(1, round(test_share * len(paths)))
            held_out[name], paths = [paths[row] for row in order[:cut]], [paths[row] for row in order[cut:]]
        for part, rows in ((train, paths), (test, held_out.get(name, []))):
            part[0].extend(rows)
            part[1].extend([label] * len(rows))
    return Folder(names, train, test)


def _images_by_class(directory: Path) -> dict[str, list[Path]]:
    found = {
        folder.name: sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
        for folder in sorted(directory.iterdir())
        if folder.is_dir()
    }
    return {name: paths for name, paths in found.items() if paths}


def write_image_folder(data: VisionData, directory: Path, per_class: int) -> Path:
    """Write the first images of each class of a data set as PNG files, ``directory/<class>/<row>.png``."""
    for label, name in enumerate(data.class_names):
        folder = directory / name
        folder.mkdir(parents=True, exist_ok=True)
        for row in np.flatnonzero(data.train_labels == label)[:per_class]:
            Image.fromarray(data.train_images[row].squeeze()).save(folder / f"{row:05d}.png")
    return directory


def draw(part: tuple[list[Path], list[int]], count: int | None, size: int, seed: int) -> ImageRows:
    """Return some rows of a part, drawn at random, or all."""
    order = np.sort(np.random.default_rng(seed).permutation(len(part[0]))[:count])
    return ImageRows([part[0][row] for row in order], [part[1][row] for row in order], size)
