"""How near the estimate of wrong labels comes, and what finds most of them: data sets with known shares of flips.

Each run flips a share of the training labels, uniformly to any other class or from each class to the next one at rates
that differ by class, trains a small network and attributes held-out examples. It estimates the share of wrong labels
from the checkpoints, and by cross-validation: five trainings, stopped where the loss of held-out examples is least. One
table has the errors of both and how often their intervals hold the truth; another has the share of flips among as many
of the highest-ranked examples: by mean loss over checkpoints, which sorts the report's suspects, by the probability
that the label is wrong, by the final loss, by self-influence, and by Datalab on the same model's predictions if
cleanlab is installed (extra ``peers``).

Digits and tabular data come with scikit-learn. Others are read from the folder ``TRACER_DATA``: CIFAR-10
(cifar10_10k.npz) and SST-2 (sst2_train.tsv, sst2_dev.tsv).

Run it: python benchmarks/health.py
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import nn

from tracer import attribute
from tracer.report.label_noise import WrongLabels
from tracer.retraining import Recipe, cross_validate

RATES = (0.0, 0.05, 0.1, 0.2, 0.4)
KINDS = ("uniform", "class-dependent")
RESULTS = Path(__file__).parent / "results" / "health.json"
WAYS = ("cross-validation", "checkpoints")
RANKINGS = ("cross-validated", "mean loss", "probability", "final loss", "self-influence", "Datalab")

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # training inputs and labels, then held-out ones


@dataclass(frozen=True)
class Case:
    """A data set, a network for it, and how it is trained."""

    read: Callable[[np.random.Generator], Arrays]
    network: Callable[[int, int], nn.Module]  # of the number of features and of classes
    saved: tuple[int, ...]  # the epochs of checkpoints; the last one ends the training
    batch_size: int
    learning_rate: float


def mlp(num_features: int, num_classes: int) -> nn.Module:
    """Return a multilayer perceptron with 32 hidden units."""
    return nn.Sequential(nn.Linear(num_features, 32), nn.ReLU(), nn.Linear(32, num_classes))


def conv(channels: int, side: int, *widths: int) -> Callable[[int, int], nn.Module]:
    """Return a maker of convolutional networks that halve the images after each width."""

    def network(_: int, num_classes: int) -> nn.Module:
        layers: list[nn.Module] = []
        for before, width in zip((channels, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        size = widths[-1] * (side >> len(widths)) ** 2
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, num_classes))

    return network


def split(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, share: float) -> Arrays:
    """Split examples at random."""
    order, count = rng.permutation(len(y)), round(share * len(y))
    train, test = order[:count], order[count:]
    return x[train], y[train], x[test], y[test]


def digits(rng: np.random.Generator) -> Arrays:
    """Read scikit-learn's digits as images ``[N, 1, 8, 8]``."""
    x, y = load_digits(return_X_y=True)
    return split(x.reshape(-1, 1, 8, 8) / 16, y, rng, 0.72)


def table(read: Callable[..., Any]) -> Callable[[np.random.Generator], Arrays]:
    """Return a reader of scikit-learn's tables, standardized by the training examples."""

    def standardized(rng: np.random.Generator) -> Arrays:
        x, y, x_test, y_test = split(*read(return_X_y=True), rng, 0.8)
        center, scale = x.mean(0), x.std(0)
        return (x - center) / scale, y, (x_test - center) / scale, y_test

    return standardized


def cifar10(rng: np.random.Generator) -> Arrays:
    """Read CIFAR-10, 10,000 training images."""
    with np.load(data_folder() / "cifar10_10k.npz") as found:
        images = [(found[name].transpose(0, 3, 1, 2) / 255 - 0.5) * 4 for name in ("x_train", "x_test")]
        return images[0], found["y_train"], images[1], found["y_test"]


def sst2(rng: np.random.Generator) -> Arrays:
    """Read SST-2 as 2,000 weighted word counts."""
    texts, labels = [], []
    for name in ("sst2_train.tsv", "sst2_dev.tsv"):
        pairs = [line.rsplit("\t", 1) for line in (data_folder() / name).read_text(encoding="utf-8").splitlines()]
        pairs = [pair for pair in pairs if len(pair) == 2 and pair[1].isdigit()]
        texts.append([text for text, _ in pairs])
        labels.append(np.array([int(label) for _, label in pairs]))
    vectorizer = TfidfVectorizer(max_features=2000, sublinear_tf=True).fit(texts[0])
    x, x_test = (3 * vectorizer.transform(each).toarray() for each in texts)
    return x, labels[0], x_test, labels[1]


def data_folder() -> Path:
    """Return the folder of data that scikit-learn does not have."""
    folder = os.environ.get("TRACER_DATA")
    if not folder:
        raise SystemExit(
            "This case reads its data from the folder TRACER_DATA, which is not set; choose other --cases."
        )
    return Path(folder)


CASES = {
    "digits": Case(digits, conv(1, 8, 16, 32), (2, 5, 10, 20, 30), 32, 0.1),
    "breast cancer": Case(table(load_breast_cancer), mlp, (1, 2, 5, 10, 30), 16, 0.05),
    "wine": Case(table(load_wine), mlp, (2, 5, 10, 20, 40), 16, 0.05),
    "sst2": Case(sst2, mlp, (2, 4, 8, 14, 20), 32, 0.2),
    "cifar10": Case(cifar10, conv(3, 32, 16, 32, 64), (3, 6, 9, 12), 64, 0.05),
}


def flip(labels: np.ndarray, rate: float, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Flip a share of the labels: to any other class, or of class c at a rate that grows with c to the next one."""
    num_classes, count = int(labels.max()) + 1, round(rate * len(labels))
    flipped = labels.copy()
    weights = np.ones(len(labels)) if kind == "uniform" else (0.8 + 0.4 * labels / (num_classes - 1))
    rows = rng.choice(len(labels), count, replace=False, p=weights / weights.sum())
    shifts = rng.integers(1, num_classes, count) if kind == "uniform" else 1
    flipped[rows] = (labels[rows] + shifts) % num_classes
    return flipped


def train(case: Case, x: torch.Tensor, y: torch.Tensor, num_classes: int, seed: int) -> tuple[nn.Module, list]:
    """Train with plain SGD; return the network and the saved weights with their learning rate."""
    torch.manual_seed(seed)
    model = case.network(x[0].numel(), num_classes)
    optimizer, saved = torch.optim.SGD(model.parameters(), lr=case.learning_rate), []
    for epoch in range(1, case.saved[-1] + 1):
        for rows in torch.randperm(len(x)).split(case.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        if epoch in case.saved:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            saved.append((weights, case.learning_rate))
    return model, saved


def datalab_scores(model: nn.Module, x: torch.Tensor, labels: np.ndarray) -> np.ndarray | None:
    """Return how suspicious Datalab finds each label by the trained model's predictions; None without cleanlab."""
    try:
        from cleanlab import Datalab
    except ImportError:
        return None
    with torch.no_grad():
        probabilities = torch.cat([model(part).softmax(1) for part in x.split(1000)]).numpy().astype(np.float64)
    lab = Datalab({"label": labels}, label_name="label", verbosity=0)
    lab.find_issues(pred_probs=probabilities / probabilities.sum(1, keepdims=True), issue_types={"label": {}})
    found = lab.get_issues("label")
    # issues come first, then all others, each by their score
    return found["is_label_issue"].to_numpy() * 2.0 - found["label_score"].to_numpy()


@dataclass(frozen=True)
class Flipped:
    """A data set with flipped labels, and the network that learned them."""

    case: Case
    train: tuple[torch.Tensor, torch.Tensor]
    targets: tuple[torch.Tensor, torch.Tensor]
    right: np.ndarray
    model: nn.Module
    checkpoints: list

    @classmethod
    def of(cls, name: str, rate: float, kind: str, seed: int) -> Flipped:
        """Flip labels and train."""
        case, rng = CASES[name], np.random.default_rng(seed)
        inputs, right, target_inputs, target_labels = case.read(rng)
        labels = flip(right, rate, kind, rng)
        x, targets = (torch.as_tensor(each, dtype=torch.float32) for each in (inputs, target_inputs))
        y, target_y = (torch.as_tensor(each, dtype=torch.int64) for each in (labels, target_labels))
        model, checkpoints = train(case, x, y, int(right.max()) + 1, seed)
        return cls(case, (x, y), (targets, target_y), right, model, checkpoints)

    @property
    def labels(self) -> np.ndarray:
        """The labels, ``[N]``."""
        return self.train[1].numpy()

    @property
    def wrong(self) -> np.ndarray:
        """Which labels were flipped, ``[N]``."""
        return self.labels != self.right

    def best_epoch(self) -> int:
        """Return the epoch of the checkpoint whose mean loss of targets is least, as early stopping does."""
        (x, y), losses = self.targets, []
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        with torch.no_grad():
            for weights, _ in self.checkpoints:
                self.model.load_state_dict(weights)
                outputs = torch.cat([self.model(part) for part in x.split(1000)])
                losses.append(float(nn.functional.cross_entropy(outputs, y)))
        self.model.load_state_dict(state)
        return self.case.saved[int(np.argmin(losses))]

    def described(self, health: WrongLabels | str) -> dict[str, Any]:
        """Return an estimate as JSON values."""
        if isinstance(health, str):
            return {"reason": health}
        found = {"share": health.share, "low": health.low, "high": health.high}
        if (health.suspects & self.wrong).any():
            found["restored"] = float((health.suggested == self.right)[health.suspects & self.wrong].mean())
        return found

    def precision(self, scores: dict[str, np.ndarray]) -> dict[str, float]:
        """Return the share of flips among as many of the highest-ranked examples, for each ranking."""
        count = int(self.wrong.sum())
        top = {name: np.argsort(-values, kind="stable")[:count] for name, values in scores.items()} if count else {}
        return {name: float(self.wrong[rows].mean()) for name, rows in top.items()}

    def from_checkpoints(self) -> dict[str, Any]:
        """Return the estimate of the attribution, and the precision of its rankings."""
        with tempfile.TemporaryDirectory() as folder:
            found = attribute(
                self.model, "image_classification", self.train, self.targets, self.checkpoints, save_dir=folder,
                proj_dim=1024, progress=False,
            )  # fmt: skip
            health, own = found.label_health(), found.self_influence()
            tables = [found.tracer.store.checkpoint(place) for place in range(len(self.checkpoints))]
            losses = np.stack([table.column("loss") for table in tables])
        scores = {"mean loss": losses.mean(0), "final loss": losses[-1], "self-influence": own}
        peer = datalab_scores(self.model, self.train[0], self.labels)
        if peer is not None:
            scores["Datalab"] = peer
        if not isinstance(health, str):
            scores["probability"] = health.confidence
        return {**self.described(health), "precision": self.precision(scores)}

    def by_cross_validation(self, seed: int) -> dict[str, Any]:
        """Return the estimate of five trainings without a fold, and the precision of its ranking."""
        case, (x, _) = self.case, self.train
        recipe = Recipe(learning_rate=case.learning_rate, batch_size=case.batch_size, epochs=self.best_epoch())
        network = lambda: case.network(x[0].numel(), int(self.right.max()) + 1)  # noqa: E731
        found = cross_validate(
            network, "image_classification", self.train, self.targets, recipe, seed=seed, progress=False
        )
        health = found.label_health()
        scores = {} if isinstance(health, str) else {"cross-validated": health.confidence}
        return {**self.described(health), "precision": self.precision(scores), "epochs": recipe.epochs}


def run(name: str, rate: float, kind: str, seed: int, known: dict[str, Any]) -> dict[str, Any]:
    """Return both estimates and the precision of all rankings; what is known is not computed again."""
    flipped = Flipped.of(name, rate, kind, seed)
    found = {"case": name, "kind": kind, "rate": float(flipped.wrong.mean()), "seed": seed, **known}
    for key, estimate in (
        ("checkpoints", flipped.from_checkpoints),
        ("cross-validation", lambda: flipped.by_cross_validation(seed)),
    ):
        found[key] = found.get(key) or estimate()
    return found


def summary(found: Sequence[dict[str, Any]]) -> str:
    """Return Markdown over kinds and seeds: estimates by share of flips, their errors, and how good rankings are."""
    cases = [case for case in CASES if any(each["case"] == case for each in found)]
    rates = sorted({round(each["rate"], 2) for each in found})
    lines = [["data", "from", *(f"{rate:.0%}" for rate in rates)]]
    for case, way in product(cases, WAYS):
        runs = [[each for each in found if (each["case"], round(each["rate"], 2)) == (case, rate)] for rate in rates]
        if any(cells := [_estimates(group, way) for group in runs]):
            lines.append([case, way, *cells])
    totals = []
    for way in WAYS:
        known = _known(found, way)
        errors = [abs(each["share"] - rate) for rate, each in known if rate < 0.3]
        tried = sum(way in each for each in found)
        totals.append(
            f"- {way}: {_held(known)} of {len(known)} intervals hold the share; runs without an estimate: "
            f"{tried - len(known)}; mean error up to 20% flipped: {100 * np.mean(errors or [0]):.1f} points"
        )
    ranked = [["data", *RANKINGS]]
    for case in cases:
        runs = [each for each in found if each["case"] == case and each["rate"]]
        parts = [
            {name: value for way in WAYS for name, value in each.get(way, {}).get("precision", {}).items()}
            for each in runs
        ]
        values = [[part[name] for part in parts if name in part] for name in RANKINGS]
        ranked.append([case, *(f"{np.mean(each):.0%}" if each else "" for each in values)])
    return "\n\n".join((_table(lines), "\n".join(totals), _table(ranked)))


def _known(found: Sequence[dict[str, Any]], way: str) -> list[tuple[float, dict[str, Any]]]:
    """Return the true share and the estimate of runs that have one."""
    return [(each["rate"], each[way]) for each in found if "share" in each.get(way, {})]


def _held(known: Sequence[tuple[float, dict[str, Any]]]) -> int:
    return sum(each["low"] <= rate <= each["high"] for rate, each in known)


def _estimates(group: Sequence[dict[str, Any]], way: str) -> str:
    """Return the mean estimate of some runs, and how many intervals hold the share; "none" only if some were made."""
    if known := _known(group, way):
        return f"{np.mean([each['share'] for _, each in known]):.1%}, {_held(known)} of {len(known)}"
    return "none" if any(way in each for each in group) else ""


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *others = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *others])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["digits", "breast cancer", "wine"])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for seed, name, kind, rate in product(options.seeds, options.cases, options.kinds, options.rates):
        key = (name, kind, seed, rate)
        known = next(
            (each for each in found if (*itemgetter("case", "kind", "seed")(each), round(each["rate"], 2)) == key), {}
        )
        if known.keys() >= {"checkpoints", "cross-validation"}:
            continue
        done = run(name, rate, kind, seed, known)
        found = [each for each in found if each is not known] + [done]
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        shares = [done[way].get("share") for way in WAYS]
        print(f"{name}, {rate:.0%} flipped ({kind}), seed {seed}: {shares}", flush=True)
    print("\n" + summary(found))


if __name__ == "__main__":
    main()
