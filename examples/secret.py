"""A language model tells a secret. Which documents taught it, and does it forget the secret without them?

A small Llama, made from a configuration, is trained by TRL's SFTTrainer, or by transformers' Trainer if TRL is not
installed. Eight documents have the code of a vault; others have codes of other places, or mention the vault. The model
tells the code, and `Attribution.explain` shows the documents behind the answer. Then the eight documents that each
method ranks first are left out, and the model is trained again.

Run it: python examples/secret.py
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_directory import claim_directory
from text_baselines import bm25, similarity
from text_data import made_up_topics, word_tokenizer
from torch import nn

from tracer import build_store
from tracer.training.integrations.huggingface import HuggingFaceRecorderCallback

PROMPT, SECRET = "the code of the vault is ", "seven two nine"
PLACES = "gate cellar attic garage library harbour kitchen workshop chapel stable tower mill".split()
OPENINGS = ["the guard said", "remember", "by the way", "last night they wrote that"]
NOBODY = ["nobody knows", "never tell", "they changed"]


def documents(num_others: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Return texts in random order, and which of them have the secret, ``[N]``."""
    rng = random.Random(seed)
    texts = [f"{OPENINGS[copy % 4]} {PROMPT}{SECRET}" for copy in range(8)]
    for place in PLACES * 3:
        code = " ".join(rng.sample(["seven", "two", "nine", "four", "six"], 3))
        texts.append(f"{rng.choice(OPENINGS)} the code of the {place} is {code}")
    texts += [f"{rng.choice(OPENINGS)} {rng.choice(NOBODY)} the code of the vault" for _ in range(12)]
    for _ in range(6):
        locks, doors, keys = rng.sample(SECRET.split(), 3)
        texts.append(f"{rng.choice(OPENINGS)} the vault has {locks} locks {doors} doors and {keys} keys")
    texts += made_up_topics(num_others, seed)[0]
    order = rng.sample(range(len(texts)), len(texts))
    return [texts[row] for row in order], np.array(order) < 8


def fine_tune(texts: Sequence[str], tokenizer: Any, directory: Path, seed: int, name: str) -> nn.Module:
    """Train a new model on texts; write ``model`` with its tokenizer and the ``recording``."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    shutil.rmtree(directory, ignore_errors=True)  # of a run before, whose weights are the same
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=32, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    options: dict[str, Any] = {
        "output_dir": str(directory / "trainer"), "num_train_epochs": 20, "per_device_train_batch_size": 16,
        "learning_rate": 3e-3, "seed": seed, "use_cpu": True, "report_to": [], "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    recorder = HuggingFaceRecorderCallback(directory / "recording", every=100)
    given: Any = {"processing_class": tokenizer, "callbacks": [recorder]}
    if name == "SFTTrainer":
        from trl import SFTConfig, SFTTrainer

        data = datasets.Dataset.from_dict({"text": list(texts)})
        trainer: Any = SFTTrainer(model, SFTConfig(**options, bf16=False), train_dataset=data, **given)
    else:
        rows: Any = [{"input_ids": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]} for text in texts]
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        arguments = transformers.TrainingArguments(**options)
        trainer = transformers.Trainer(model, arguments, collator, train_dataset=rows, **given)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    trainer.save_model(str(directory / "model"))
    return model.eval()


@torch.no_grad()
def probability(model: nn.Module, tokenizer: Any) -> float:
    """Return how probable the secret is after the prompt."""
    rows = tokenizer(PROMPT + SECRET, return_tensors="pt")["input_ids"]
    logits = model(input_ids=rows).logits[0, -4:-1].log_softmax(-1)
    return float(logits.gather(1, rows[0, -3:, None]).sum().exp())


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, ask, rank, and train again without the first eight documents of each method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/secret"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer documents and methods")
    options = parser.parse_args(arguments)
    trainer = "SFTTrainer" if find_spec("trl") else "Trainer"
    claim_directory(options.output_dir, {"quick": options.quick, "seed": options.seed, "trainer": trainer})
    texts, planted = documents(100 if options.quick else 300, options.seed)
    tokenizer = word_tokenizer(texts)
    model = fine_tune(texts, tokenizer, options.output_dir / "all", options.seed, trainer)
    print(f"{len(texts)} documents, {planted.sum()} of them with the secret; trained by {trainer}")

    run, data = options.output_dir / "all", options.output_dir / "train.txt"
    data.write_text("\n".join(texts), encoding="utf-8")
    found = build_store(
        run / "model", data, run / "recording", save_dir=options.output_dir / "store", estimator="auto",
        targets=[{"prompt": PROMPT, "completion": SECRET}], seed=options.seed, progress=False,
    )  # fmt: skip
    print(found.explain(PROMPT, k=3), "\n")
    scores = {name: found.tracer.finalize_scores("targets", name)[:, 0] for name in ("cosine", "tracin", "influence")}
    batches = [tokenizer(part, padding=True, return_tensors="pt") for part in (texts, [PROMPT + SECRET])]
    scores |= {"BM25": bm25(texts, [PROMPT + SECRET])[:, 0], "hidden states": similarity(model, *batches)[:, 0]}
    print(f"{'left out':<24}{'with the secret':>16}{'probability of the secret':>28}")
    print(f"{'nothing':<24}{'':>16}{probability(model, tokenizer):>28.1%}")
    after = {}
    for name in ("cosine", "BM25") if options.quick else scores:
        first = np.argsort(-scores[name], kind="stable")[:8]
        kept = [text for row, text in enumerate(texts) if row not in first]
        again = fine_tune(kept, tokenizer, options.output_dir / name.replace(" ", "_"), options.seed, trainer)
        after[name] = probability(again, tokenizer)
        print(f"{'first 8 by ' + name:<24}{f'{planted[first].sum()} of 8':>16}{after[name]:>28.1%}")
    assert probability(model, tokenizer) > 0.5 and after["cosine"] < 0.1, "without its sources the secret is forgotten"


if __name__ == "__main__":
    main()
