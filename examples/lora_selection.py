"""Choose fine-tuning sentences for a LoRA adapter by their influence on a task, as LESS does, and measure the gain.

A tiny Llama knows the words of made-up sentences, but not their order. The pool has sentences of four topics, half of
them with their words in random order; the task is to predict sentences of one topic. After a warm-up on a random part
of the pool, each method chooses a tenth of it by the mean score for 20 sentences of the task, and a new adapter is
trained on these alone. Beside the library's estimators stand random choices, BM25, similar hidden states, and LESS with
its own settings (Xia et al. 2024): Adam's update for training sentences, plain gradients for the task's, the cosine.

Run it: python examples/lora_selection.py
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lora_finetune import next_word_loss, tiny_llama, with_adapter
from run_directory import claim_directory
from text_baselines import bm25, similarity
from text_data import Rows, made_up_topics, padded
from torch import Tensor, nn

from tracer import attribute

EPOCHS, BATCH = 4, 8


def shuffled(text: str, rng: random.Random) -> str:
    """Return a sentence with its words in random order."""
    words = text.split()
    return " ".join(rng.sample(words, len(words)))


def fine_tune(model: nn.Module, rows: Sequence[Tensor], seed: int) -> list[tuple[dict[str, Any], float]]:
    """Train the adapter by AdamW; return a checkpoint with the optimizer's state for each epoch, and the mean rate."""
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    steps = EPOCHS * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator, checkpoints = torch.Generator().manual_seed(seed), []
    for _ in range(EPOCHS):
        rates = []
        for batch in torch.randperm(len(rows), generator=generator).split(BATCH):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            next_word_loss(model, padded([rows[row] for row in batch.tolist()])).backward()
            optimizer.step()
            schedule.step()
        state = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        checkpoints.append((state, float(np.mean(rates))))
    return checkpoints


def gradients(model: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    """Return the gradient of each row's loss in the adapter, ``[N, P]``, by a loop."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    losses = (next_word_loss(model, padded([row])) for row in rows)
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in losses])


def less(model: nn.Module, checkpoints: Sequence, pool: Sequence[Tensor], task: Sequence[Tensor]) -> np.ndarray:
    """Return the scores of LESS (equation 3 of the paper, with moments as in its code), ``[N]``."""
    total = torch.zeros(len(pool))
    for checkpoint, rate in checkpoints:
        model.load_state_dict(checkpoint["model"])
        group, state = checkpoint["optimizer"]["param_groups"][0], checkpoint["optimizer"]["state"].values()
        first, second = (torch.cat([each[name].flatten() for each in state]) for name in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        own = gradients(model, pool)
        update = (beta1 * first + (1 - beta1) * own) / (beta2 * second + (1 - beta2) * own**2 + group["eps"]).sqrt()
        aims = nn.functional.normalize(gradients(model, task))
        total += rate * (nn.functional.normalize(update) @ aims.T).mean(1)
    return total.numpy()


def influence(model: nn.Module, checkpoints: Sequence, pool: Rows, task: Rows, folder: Path) -> dict[str, np.ndarray]:
    """Return the mean scores for the task of each estimator, ``[N]``."""
    found = {}
    for name, options in {"": {}, ", Adam": {"preconditioner": "adam"}}.items():
        given: Any = {"collate_fn": padded, "params": "*lora_*", "proj_dim": 2048, "progress": False, **options}
        result = attribute(
            model, "language_modeling", pool, task, checkpoints, save_dir=folder / f"store{len(options)}", **given
        )
        for estimator in ("cosine", "tracin"):
            found[estimator + name] = np.asarray(result.tracer.finalize_scores("targets", estimator)).mean(1)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Warm up, rank the pool, train on what each method chooses and print the losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/lora_selection"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tinier model and fewer sentences")
    options = parser.parse_args(arguments)
    claim_directory(options.output_dir, {"seed": options.seed, "quick": options.quick})
    rng, count = random.Random(options.seed), 400 if options.quick else 800
    texts, topics = made_up_topics(count, options.seed)
    clean = np.array([rng.random() < 0.5 for _ in texts])
    texts = [text if ordered else shuffled(text, rng) for text, ordered in zip(texts, clean, strict=True)]
    others = [text for text, topic in zip(*made_up_topics(800, options.seed + 1), strict=True) if topic == 0]
    words = [shuffled(text, rng) for text in made_up_topics(1000, options.seed + 2)[0]]
    base, encode = tiny_llama(words, options)
    pool, task, test = (Rows(encode(each)) for each in (texts, others[:20], others[20:]))

    def adapted(rows: Sequence[int], seed: int) -> tuple[nn.Module, list]:
        """Return the base with an adapter that was trained on some rows of the pool, and its checkpoints."""
        model = with_adapter(copy.deepcopy(base), seed)
        return model, fine_tune(model, [pool[row] for row in rows], seed)

    def losses(rows: Sequence[int]) -> list[float]:
        """Return the test loss of adapters trained on some rows of the pool, with several seeds."""
        models = (adapted(rows, seed)[0].eval() for seed in range(1 if options.quick else 3))
        return [next_word_loss(model, padded(test.rows)).item() for model in models]

    model, checkpoints = adapted(rng.sample(range(count), count // 10), options.seed)
    scores = influence(model, checkpoints, pool, task, options.output_dir)
    scores["LESS"] = less(model, checkpoints, pool.rows, task.rows)
    scores["BM25"] = bm25(texts, others[:20]).mean(1)
    scores["hidden states"] = similarity(model, padded(pool.rows), padded(task.rows)).mean(1)
    choices = {name: np.argsort(-values, kind="stable")[: count // 10] for name, values in scores.items()}
    right = clean & (np.array(topics) == 0)
    choices |= {"the right ones": np.flatnonzero(right)[: count // 10], "the whole pool": np.arange(count)}
    drawn = [loss for _ in range(3) for loss in losses(rng.sample(range(count), count // 10))]
    print(f"\n{'trained on':<20}{'rows':>6}{'right ones':>12}{'test loss':>16}{'gain':>8}")
    print(f"{'random':<20}{count // 10:>6}{right.mean():>12.0%}{np.mean(drawn):>9.2f} ± {np.std(drawn):.2f}")
    gains = {}
    for name, rows in choices.items():
        found = losses(rows.tolist())
        gains[name] = float(np.mean(drawn) - np.mean(found))
        print(
            f"{name:<20}{len(rows):>6}{right[rows].mean():>12.0%}{np.mean(found):>9.2f} ± {np.std(found):.2f}"
            f"{gains[name]:>+8.2f}"
        )
    assert gains["cosine, Adam"] > max(0.1, gains["BM25"]), "influence should choose better than words, and chance"


if __name__ == "__main__":
    main()
