"""bergson's EK-FAC and TrackStar behind one signature; see `quality_peers`.

bergson 2.5.1 takes language models of Hugging Face by name or folder, and text. `Decoder` is a GPT-2 with another
activation, so its weights become one, its characters a tokenizer, and its rows text of one more character: bergson
predicts each from those before it. Both methods are called with their defaults, at the last checkpoint: EK-FAC whole
gradients with a damping of a tenth of the mean eigenvalue, TrackStar (Chang et al. 2024) 16 x 16 numbers a module.
Modules are the blocks' linear ones, without biases.
"""

from __future__ import annotations

import contextlib
import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_methods import Case, Found, Method, Rows, method
from quality_tracer import stored_bytes
from torch import nn

CONTEXT = 2048
"""bergson's default of tokens in a batch, which may not be more than a model can read."""


def gpt2(model: nn.Module) -> nn.Module:
    """Return a `Decoder` as Hugging Face's GPT-2.

    Args:
        model: The network.

    Returns:
        One with the same outputs, in eval mode, that can read `CONTEXT` tokens.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    vocabulary, dim = model.tokens.weight.shape
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=CONTEXT,
        n_embd=dim,
        n_layer=len(model.blocks),
        n_head=model.blocks[0].attention.heads,
        activation_function="gelu",
        bos_token_id=None,
        eos_token_id=None,
    )
    made = GPT2LMHeadModel(config)
    with torch.no_grad():
        made.transformer.wte.weight.copy_(model.tokens.weight)
        made.transformer.wpe.weight.zero_()[: len(model.positions.weight)].copy_(model.positions.weight)
        pairs = [(made.transformer.ln_f, model.norm)]
        for theirs, ours in zip(made.transformer.h, model.blocks, strict=True):
            pairs += [(theirs.ln_1, ours.norm1), (theirs.ln_2, ours.norm2), (theirs.mlp.c_fc, ours.mlp[0])]
            pairs += [(theirs.attn.c_attn, ours.attention.qkv), (theirs.attn.c_proj, ours.attention.out)]
            pairs += [(theirs.mlp.c_proj, ours.mlp[2])]
        for theirs, ours in pairs:
            theirs.weight.copy_(ours.weight.T if ours.weight.ndim == 2 else ours.weight)
            theirs.bias.copy_(ours.bias)
    return made.eval()


def save_texts(rows: Rows, path: Path) -> None:
    """Write rows as a data set of texts, each character the one of its number."""
    from datasets import Dataset

    texts = ["".join(map(letter, [*x.tolist(), int(y[-1])])) for x, y in zip(*rows, strict=True)]
    Dataset.from_dict({"text": texts}).save_to_disk(str(path))


def letter(code: int) -> str:
    """Return a character for a number: none that a tokenizer treats in its own way."""
    return chr(0x4E00 + code)


def save_tokenizer(vocabulary: int, path: Path) -> None:
    """Write a tokenizer of `letter`, with a chat template that joins prompt and completion."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({letter(code): code for code in range(vocabulary)}, unk_token=letter(0))
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, pad_token=letter(0))
    made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    made.save_pretrained(path)


def bergson_scores(case: Case, folder: Path, kind: str) -> Found:
    """Influence at the last checkpoint.

    Args:
        case: What is scored.
        folder: Where it keeps everything.
        kind: ``ekfac`` or ``trackstar``.

    Returns:
        Scores.
    """
    model = gpt2(case.states()[-1])
    model.save_pretrained(folder / "model")
    save_tokenizer(model.config.vocab_size, folder / "model")
    for name, rows in (("train", case.train), ("targets", case.targets)):
        save_texts(rows, folder / name)
    del model
    scores = run(kind, folder, "run")
    index = folder / "run" / "query"
    return Found("", scores, row_bytes=0.0 if kind == "ekfac" else stored_bytes(index) / case.sizes[1])


def run(kind: str, folder: Path, name: str, **columns: str) -> np.ndarray:
    """Score the texts in a folder's ``train`` on those in ``targets`` by the ``model`` in it.

    Args:
        kind: ``ekfac`` or ``trackstar``.
        folder: The folder.
        name: Of a new folder in it, for what bergson keeps.
        **columns: The columns of the texts, as bergson's ``DataConfig`` takes them.

    Returns:
        Scores ``[N, M]``.
    """
    from bergson.config.config import DataConfig, QuerySetConfig
    from bergson.data import load_scores

    data, query = DataConfig(str(folder / "train"), **columns), QuerySetConfig(str(folder / "targets"), **columns)
    options = {"run_path": str(folder / name), "model": str(folder / "model"), "data": data}
    with contextlib.redirect_stdout(io.StringIO()):
        (run_ekfac if kind == "ekfac" else run_trackstar)(options, query)
    return np.array(load_scores(folder / name / "scores")[:], dtype=np.float64)


def run_ekfac(options: dict[str, Any], query: Any) -> None:
    """Run ``bergson ekfac``."""
    from bergson.config import config
    from bergson.hessians.pipeline import hessian_pipeline

    hessian_pipeline(
        config.IndexConfig(**options),
        config.HessianConfig("kfac", ev_correction=True),
        config.ScoreConfig(),
        config.PreprocessConfig(),
        config.HessianPipelineConfig(query=query),
    )


def run_trackstar(options: dict[str, Any], query: Any) -> None:
    """Run ``bergson trackstar``."""
    from bergson.cli.trackstar import trackstar
    from bergson.config import config

    trackstar(config.TrackstarIndexConfig(**options), config.TrackstarConfig(query=query))


def needs_language(case: Case) -> str:
    """Return why bergson does not apply, or nothing."""
    return "" if case.task == "language_modeling" else "for language models only"


def bergson_methods() -> list[Method]:
    """Return bergson's methods."""
    return [
        method(f"bergson {name}, last checkpoint", partial(bergson_scores, kind=kind), unfit=needs_language)
        for name, kind in (("EK-FAC", "ekfac"), ("TrackStar, p=16", "trackstar"))
    ]
