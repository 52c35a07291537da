"""Which reviews taught a BERT-style classifier its verdict, and which of them have the wrong label?

A Hugging Face BERT classifies sentences as praise or blame; a tenth of the training labels is flipped on purpose. From
the checkpoints of its training `tracer.attribute` finds, for each sentence of the test set, the training sentences that
spoke for and against its label, and ranks the training sentences by self-influence (TracInCP; Pruthi et al. 2020),
by which wrong labels stand out. Batches go to the library as Hugging Face collators make them.

Run it: python examples/sst2_bert.py --data-dir folder, which holds sst2_train.tsv and sst2_dev.tsv
(lines: sentence tab label), by default the folder that TRACER_DATA names; without files it makes sentences up.
Without --model a tiny BERT is trained from scratch on whole words; with --model a pretrained one is fine-tuned.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from text_data import Rows, Words, find_file, made_up_reviews, padded, read_labelled
from text_training import train_or_reuse
from torch import Tensor, nn

from tracer import Attribution, attribute

CLASS_NAMES = ["blame", "praise"]
CHECKED_SHARES = (0.1, 0.2, 0.3)

Texts = tuple[list[str], list[int]]


def load_texts(options: argparse.Namespace) -> tuple[Texts, Texts]:
    """Return training and test sentences with their labels, from files where there are any."""
    folder = options.data_dir
    paths = None if options.quick and folder is None else [find_file(f"sst2_{p}.tsv", folder) for p in ("train", "dev")]
    if paths is not None and paths[0] is not None and paths[1] is not None:
        print(f"Sentences: {paths[0].name} and {paths[1].name}")
        return read_labelled(paths[0], options.num_train), read_labelled(paths[1], options.num_targets)
    if folder is not None:
        raise SystemExit(f"There is no sst2_train.tsv with sst2_dev.tsv in {folder}.")
    print("Sentences: made up")
    texts, labels = made_up_reviews(options.num_train + options.num_targets, options.seed)
    cut = options.num_train
    return (texts[:cut], labels[:cut]), (texts[cut:], labels[cut:])


def tiny_bert(
    texts: Sequence[str], seed: int, quick: bool
) -> tuple[nn.Module, Callable[[Sequence[str]], list[Tensor]]]:
    """Return a BERT of a tiny configuration with random weights, and its encoder of sentences as whole words."""
    from transformers import BertConfig, BertForSequenceClassification

    words = Words(texts, size=200 if quick else 3000, length=40)
    torch.manual_seed(seed)
    dim = 32 if quick else 64
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=dim,
        num_hidden_layers=1 if quick else 2,
        num_attention_heads=2,
        intermediate_size=2 * dim,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config), words.encode


def pretrained(name: str) -> tuple[nn.Module, Callable[[Sequence[str]], list[Tensor]]]:
    """Return a pretrained model with a new head for two classes, and its tokenizer as an encoder."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)

    def encode(texts: Sequence[str]) -> list[Tensor]:
        return [torch.tensor(tokenizer(text, truncation=True, max_length=128)["input_ids"]) for text in texts]

    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=2), encode


def collate(rows: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Pad rows to the longest and name everything as Hugging Face does."""
    return padded([tokens for tokens, _ in rows]) | {"labels": torch.tensor([label for _, label in rows])}


def flip(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], np.ndarray]:
    """Return labels of which a share is flipped, and which ones are, ``[N]`` bool."""
    rng = np.random.default_rng(seed)
    flipped = np.zeros(len(labels), dtype=bool)
    flipped[rng.choice(len(labels), round(share * len(labels)), replace=False)] = True
    return [1 - label if wrong else label for label, wrong in zip(labels, flipped, strict=True)], flipped


@torch.no_grad()
def predict(model: nn.Module, rows: Rows) -> np.ndarray:
    """Return the classes that the model, as it is now, predicts ``[N]``."""
    batches = [collate(rows.rows[start : start + 64]) for start in range(0, len(rows), 64)]
    return torch.cat([model(**batch).logits.argmax(1) for batch in batches]).numpy()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="where sst2_train.tsv and sst2_dev.tsv are ($TRACER_DATA)")
    parser.add_argument("--model", help="a pretrained model's name or folder, such as distilbert-base-uncased")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/sst2_bert"))
    parser.add_argument("--num-train", type=int, help="training sentences (all)")
    parser.add_argument("--num-targets", type=int, help="test sentences (300)")
    parser.add_argument("--epochs", type=int, help="passes over the training sentences (3)")
    parser.add_argument("--learning-rate", type=float, help="of AdamW (0.001; 0.00003 with --model)")
    parser.add_argument("--flip-rate", type=float, default=0.1, help="share of flipped training labels (0.1)")
    parser.add_argument("--proj-dim", type=int, help="numbers stored of each gradient (2048)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tinier model on made-up sentences: a few seconds")
    options = parser.parse_args(arguments)
    options.num_train = options.num_train or (240 if options.quick else 6920)
    options.num_targets = options.num_targets or (60 if options.quick else 300)
    options.epochs = options.epochs or (5 if options.quick else 3)
    options.learning_rate = options.learning_rate or (3e-5 if options.model else 3e-3 if options.quick else 1e-3)
    options.proj_dim = options.proj_dim or (512 if options.quick else 2048)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, attribute, print and check what is found, and write the report."""
    options = parse(arguments)
    (texts, right), (target_texts, target_labels) = load_texts(options)
    labels, flipped = flip(right, options.flip_rate, options.seed)
    print(
        f"{len(texts):,} sentences for training, {flipped.sum()} with a flipped label; {len(target_texts)} for testing"
    )
    model, encode = pretrained(options.model) if options.model else tiny_bert(texts, options.seed, options.quick)
    train = Rows(list(zip(encode(texts), labels, strict=True)))
    targets = Rows(list(zip(encode(target_texts), target_labels, strict=True)))
    checkpoints = train_or_reuse(
        model,
        train,
        options.output_dir / "checkpoints",
        collate=collate,
        loss=lambda model, batch: model(**batch).loss,
        epochs=options.epochs,
        batch_size=16,
        learning_rate=options.learning_rate,
        adam=True,
        settings={"model": options.model, "texts": zlib.crc32(repr((texts, labels)).encode()), "seed": options.seed},
        seed=options.seed,
    )
    found = attribute(
        model,
        "text_classification",
        train,
        targets,
        checkpoints,
        save_dir=options.output_dir / "store",
        collate_fn=collate,
        preconditioner="adam",
        proj_dim=options.proj_dim,
        seed=options.seed,
    )
    self_influence, top = found.self_influence(), found.top(8)
    predictions, target_predictions = predict(model, train), predict(model, targets)
    accuracy = float(np.mean(target_predictions == target_labels))
    print(f"Test accuracy at the last checkpoint: {accuracy:.1%}")
    show_targets(found, texts, labels, flipped, target_texts, target_labels)
    check(self_influence, flipped, np.array(labels)[top.indices], np.array(target_labels), accuracy)

    index = found.report(
        options.output_dir / "report",
        inputs=texts,
        labels=labels,
        target_inputs=target_texts,
        target_labels=target_labels,
        train_predictions=predictions,
        target_predictions=target_predictions,
        class_names=CLASS_NAMES,
        known_mislabelled=flipped,
        figures=not options.quick,
        title="SST-2, BERT",
        settings={"model": options.model or "tiny BERT", "rows": len(texts), "epochs": options.epochs},
    )
    print(f"\nReport: {index}")


def show_targets(
    found: Attribution,
    texts: Sequence[str],
    labels: Sequence[int],
    flipped: np.ndarray,
    target_texts: Sequence[str],
    target_labels: Sequence[int],
) -> None:
    """Print the strongest training sentences of a test sentence of each class; those with a flipped label have a *."""
    proponents, opponents = found.top(2).indices, found.top(2, kind="opponents").indices
    for target in (target_labels.index(0), target_labels.index(1)):
        print(f"\n{CLASS_NAMES[target_labels[target]]}: {target_texts[target]}")
        for mark, rows in (("+", proponents[target]), ("-", opponents[target])):
            for row in rows:
                print(f"  {mark} {CLASS_NAMES[labels[row]]}{'*' if flipped[row] else ''}: {texts[row]}")


def check(
    self_influence: np.ndarray, flipped: np.ndarray, labels: np.ndarray, target_labels: np.ndarray, accuracy: float
) -> None:
    """Print how many flipped labels stand out and how proponents' labels agree with the targets'; assert both.

    Args:
        self_influence: ``[N]``.
        flipped: ``[N]``, bool.
        labels: ``[M, k]``, of each target's proponents, as trained on.
        target_labels: ``[M]``.
        accuracy: On the targets.
    """
    hits = np.cumsum(flipped[np.argsort(-self_influence, kind="stable")])
    found = {share: int(hits[round(share * len(hits)) - 1]) / int(flipped.sum()) for share in CHECKED_SHARES}
    shares = ", ".join(f"{value:.0%} in the top {share:.0%}" for share, value in found.items())
    print(f"\nFlipped labels by self-influence: {shares}")
    agreeing = float((labels == target_labels[:, None]).mean())
    print(f"Proponents that have their target's label: {agreeing:.1%}")
    assert accuracy > 0.6, "the classifier should have learnt something"
    assert found[0.2] > 0.3, "self-influence should find flipped labels well above the rate of chance"
    assert agreeing > 0.8, "proponents should have the label of their target"


if __name__ == "__main__":
    main()
