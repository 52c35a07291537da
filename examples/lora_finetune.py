"""Which fine-tuning sentences taught a LoRA adapter what it does? Only the adapter's gradients are taken.

A tiny Llama (random weights, made from a configuration) learns made-up sentences of four topics that end in any way.
Then it is frozen and a LoRA adapter (Hu et al. 2022) of the peft package is fine-tuned on sentences in which each topic
always ends in its own way. For sentences it has not seen, `tracer.attribute` with ``params="*lora_*"`` ranks the
fine-tuning sentences by their influence through the adapter alone (TracInCP; Pruthi et al. 2020), and
`tracer.token_influence` says from which of their words it comes.

Run it: python examples/lora_finetune.py
With --model a pretrained causal language model takes the place of the tiny one; it is not trained before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from text_data import TOPICS, Rows, Words, made_up_topics, padded
from text_training import train_or_reuse
from torch import Tensor, nn

from tracer import attribute, token_influence

Encode = Callable[[Sequence[str]], list[Tensor]]


def next_word_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of all words of a batch that are not padding, the first of a row left out."""
    logits = model(**batch).logits[:, :-1]
    labels = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return nn.functional.cross_entropy(logits.transpose(1, 2), labels)


def tiny_llama(texts: Sequence[str], options: argparse.Namespace) -> tuple[nn.Module, Encode]:
    """Return a tiny Llama that has learnt sentences, and its encoder of sentences as whole words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = Words(texts, size=200, length=16)
    torch.manual_seed(options.seed)
    dim = 32 if options.quick else 64
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=dim,
        num_hidden_layers=1 if options.quick else 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * dim,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows, generator = words.encode(texts), torch.Generator().manual_seed(options.seed)
    for _ in range(3):
        for batch in torch.randperm(len(rows), generator=generator).split(16):
            value = next_word_loss(model, padded([rows[row] for row in batch.tolist()]))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    print(f"Base: a tiny Llama, loss {value.item():.2f} on sentences that end in any way")
    return model, words.encode


def pretrained(name: str) -> tuple[nn.Module, Encode]:
    """Return a pretrained causal language model and its tokenizer as an encoder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)

    def encode(texts: Sequence[str]) -> list[Tensor]:
        return [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]

    return AutoModelForCausalLM.from_pretrained(name), encode


def with_adapter(model: nn.Module, seed: int) -> nn.Module:
    """Freeze a model and give its attention and MLP layers LoRA adapters of rank 4."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(model, config)


@torch.no_grad()
def ending_loss(model: nn.Module, rows: Sequence[Tensor]) -> float:
    """Return the mean loss of the last two words of all rows, which a row's topic decides."""
    model.eval()
    losses = []
    for row in rows:
        logits = model(input_ids=row[None]).logits[0, -3:-1]
        losses.append(float(nn.functional.cross_entropy(logits, row[-2:])))
    return float(np.mean(losses))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a pretrained causal language model's name or folder")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/lora_finetune"))
    parser.add_argument("--num-train", type=int, help="fine-tuning sentences (1,000)")
    parser.add_argument("--num-targets", type=int, help="sentences to explain (100)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the fine-tuning sentences (4)")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of AdamW (0.01)")
    parser.add_argument("--proj-dim", type=int, help="numbers stored of each gradient (2048)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tinier model and fewer sentences: a few seconds")
    options = parser.parse_args(arguments)
    options.num_train = options.num_train or (160 if options.quick else 1000)
    options.num_targets = options.num_targets or (24 if options.quick else 100)
    options.proj_dim = options.proj_dim or (512 if options.quick else 2048)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune an adapter, attribute through it, and print and check what is found."""
    options = parse(arguments)
    texts, topics = made_up_topics(options.num_train, options.seed + 1, habits=True)
    target_texts, target_topics = made_up_topics(options.num_targets, options.seed + 2, habits=True)
    base_texts = made_up_topics(320 if options.quick else 2000, options.seed)[0]
    model, encode = pretrained(options.model) if options.model else tiny_llama(base_texts, options)
    model = with_adapter(model, options.seed)
    adapter = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    print(
        f"Adapter: {sum(parameter.numel() for _, parameter in adapter):,} of "
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"
    )
    train, targets = Rows(encode(texts)), Rows(encode(target_texts))
    before = ending_loss(model, targets.rows)
    checkpoints = train_or_reuse(
        model,
        train,
        options.output_dir / "checkpoints",
        collate=padded,
        loss=next_word_loss,
        epochs=options.epochs,
        batch_size=16,
        learning_rate=options.learning_rate,
        adam=True,
        settings={"model": options.model, "rows": len(train), "quick": options.quick, "seed": options.seed},
        seed=options.seed,
    )
    after = ending_loss(model, targets.rows)
    print(f"Loss of a sentence's last two words, which its topic decides: {before:.2f} before, {after:.2f} after")
    found = attribute(
        model,
        "language_modeling",
        train,
        targets,
        checkpoints,
        save_dir=options.output_dir / "store",
        collate_fn=padded,
        params="*lora_*",
        preconditioner="adam",
        proj_dim=options.proj_dim,
        seed=options.seed,
    )
    top = found.top(5).indices
    for target in range(3):
        row = int(top[target, 0])
        split = token_influence(
            model, "language_modeling", padded([train.rows[row]]), padded([targets.rows[target]]), checkpoints,
            params="*lora_*", preconditioner="adam",
        )[0, 0]  # fmt: skip
        print(f"\n{target_texts[target]}\n  from: {texts[row]}")
        print("  parts:", " ".join(f"{100 * part / np.abs(split).sum():+.0f}%" for part in split))

    assert after < 0.7 * before, "the adapter should have learnt how sentences of a topic end"
    stored = list(found.tracer.store.manifest.settings["params"])
    check(stored, [name for name, _ in adapter], np.array(topics)[top], np.array(target_topics))


def check(stored: list[str], adapter: list[str], topics: np.ndarray, target_topics: np.ndarray) -> None:
    """Print which parameters were taken and how proponents' topics agree with the targets'; assert both.

    Args:
        stored: The names of the store's parameters.
        adapter: The names of the adapter's.
        topics: ``[M, k]``, of each target's proponents.
        target_topics: ``[M]``.
    """
    sharing = float((topics == target_topics[:, None]).mean())
    print(f"\nParameters in the store: {len(stored)}, all of the adapter: {all('.lora_' in name for name in stored)}")
    print(f"Proponents of their target's topic: {sharing:.0%} (chance: {1 / len(TOPICS):.0%})")
    assert sorted(stored) == sorted(adapter), "the store should have the adapter's parameters only"
    assert all(".lora_" in name for name in stored)
    assert sharing > 2.5 / len(TOPICS), "proponents should share their target's topic far above chance"


if __name__ == "__main__":
    main()
