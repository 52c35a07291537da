"""How much memory does a long row of a language model need, compared with a plain pass over it?

A decoder of 110M parameters (Llama, 12 layers of width 768, 32,000 tokens) with gradient checkpointing reads one row.
*plain* is a forward and a backward in training mode, *checked* featurizing the first row, which is compared with
autograd and audited, and *later* a row after many. Each runs in a process of its own; figures are by how much its own
memory rises at most, in MB, and that over the plain pass.

Run it: python benchmarks/long_rows.py                     some minutes of two cores; needs transformers
        with --tokens 1024,2048 --layers 4: smaller
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timing import peak_mb, table, write_results
from torch import nn

RESULTS = Path(__file__).parent / "results"
KINDS = ("plain", "checked", "later")
SHORT, NUM_SHORT = 32, 17  # rows before the later one: the first 16 are audited whatever it costs


def decoder(layers: int) -> nn.Module:
    """Return an untrained decoder whose layers are checkpointed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 12}
    config = LlamaConfig(vocab_size=32_000, max_position_embeddings=1 << 15, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def measure(kind: str, tokens: int, layers: int) -> dict[str, Any]:
    """Return the memory and time of a row in this process."""
    from tracer import Tracer

    model, generator = decoder(layers), torch.Generator().manual_seed(0)

    def row(length: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(32_000, (1, length), generator=generator)}

    def plain() -> None:
        batch = row(tokens)
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()

    with tempfile.TemporaryDirectory() as folder:
        tracer = Tracer(model, "language_modeling", NUM_SHORT + 1, folder, progress=False)
        if kind != "plain":
            tracer.load_checkpoint(model.state_dict(), model_id=0)
        for _ in range(NUM_SHORT if kind == "later" else 0):
            tracer.featurize(row(SHORT), num_samples=1)
        work = plain if kind == "plain" else lambda: tracer.featurize(row(tokens), num_samples=1)
        began = time.process_time()
        peak = peak_mb(work)
    return {"tokens": tokens, "layers": layers, "kind": kind, "peak_mb": peak, "seconds": time.process_time() - began}


def main() -> None:
    """Measure each kind in a process of its own, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="8192", help="Numbers of tokens, with commas.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--only", choices=KINDS, help="measure this kind here, and print JSON")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, int(options.tokens), options.layers)))
        return
    rows = []
    for tokens in map(int, options.tokens.split(",")):
        found = {}
        for kind in KINDS:
            given = ["--only", kind, "--tokens", str(tokens), "--layers", str(options.layers)]
            done = subprocess.run([sys.executable, __file__, *given], check=True, capture_output=True, text=True)
            found[kind] = json.loads(done.stdout.splitlines()[-1])
        for each in found.values():
            rows.append({**each, "ratio": each["peak_mb"] / found["plain"]["peak_mb"]})
    headers = {"tokens": "tokens", "layers": "layers", "kind": "row", "peak_mb": "peak MB", "ratio": "over plain"}
    print(table(rows, {**headers, "seconds": "CPU seconds"}))
    print(write_results(options.output_dir, "long_rows", rows))


if __name__ == "__main__":
    main()
