"""Everything that needs a GPU, in under ten minutes: checks, then costs, into one JSON file.

Each part runs in a process of its own with a time limit, so that one that fails or runs out of memory is written down
with its error, and the others go on. Costs are multiples of one plain forward and backward of the same batches, in turn
in one process; peaks are those of torch's allocator.

Run it: python benchmarks/gpu.py                   all parts
        python benchmarks/gpu.py --only gpt2       parts with this in their name
        python benchmarks/gpu.py --tiny            small sizes, also without a GPU: does the script itself work?
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from models import Decoder, ResNet9, mlp
from timing import alternate, machine, ratio, write_results
from torch import Tensor, nn

from tracer import Tracer

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Work:
    """A model and a batch on the device, and what it is featurized with.

    Attributes:
        model: The model.
        batch: Its batch: a tuple, or a mapping for models of transformers.
        task: The task's name.
        loss: The mean loss of the batch, for the plain pass.
        options: More options of the Tracer.
    """

    model: nn.Module
    batch: Any
    task: str
    loss: Callable[[nn.Module, Any], Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The number of examples of the batch."""
        return len(next(iter(self.batch.values())) if isinstance(self.batch, Mapping) else self.batch[0])

    def plain_pass(self) -> None:
        """Compute the gradient of the mean loss, under the autocast that featurizing has."""
        self.model.zero_grad(set_to_none=True)
        dtype = self.options.get("autocast")
        with torch.autocast(DEVICE.type, getattr(torch, dtype or "bfloat16"), enabled=dtype is not None):
            loss = self.loss(self.model, self.batch)
        loss.backward()

    def measure(self, rounds: int, proj_dim: int) -> dict[str, Any]:
        """Alternate plain passes and featurizing of the batch, other rows each time."""
        folder = Path(tempfile.mkdtemp(prefix="tracer-gpu-"))
        repeats = rounds + 20  # the first sixteen are checked more often
        try:
            tracer = Tracer(
                self.model, self.task, self.rows * repeats, folder, proj_dim=proj_dim, check_rows=False, **self.options
            )
            tracer.load_checkpoint({name: value.cpu() for name, value in self.model.state_dict().items()}, 0)

            def featurize() -> None:
                tracer.featurize(self.batch, num_samples=self.rows)

            start = time.perf_counter()
            featurize()
            first = time.perf_counter() - start
            for _ in range(16):
                featurize()
            seconds = alternate({"plain": self.plain_pass, "featurize": featurize}, rounds, warmup=2)
            self.model.zero_grad(set_to_none=True)
            peaks = {name: peak_gb(work) for name, work in (("plain", self.plain_pass), ("featurize", featurize))}
            tracer.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "trained": sum(each.numel() for each in self.model.parameters() if each.requires_grad),
            "examples": self.rows,
            "proj_dim": proj_dim,
            "plain_ms": 1e3 * statistics.median(seconds["plain"]),
            "ratio": ratio(seconds, "featurize", "plain"),
            "first_batch_s": first,
            **{f"{name}_gb": peak for name, peak in peaks.items()},
        }


def peak_gb(work: Callable[[], None]) -> float | None:
    """Return the most memory that tensors had during work, in gigabytes; None on a CPU."""
    if DEVICE.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def pytest_marked(tiny: bool) -> dict[str, Any]:
    """Run the tests that are marked ``gpu``; they are skipped without one."""
    return run_tests(["-m", "gpu", *(["tests/projection"] if tiny else [])])


def whole_suite(tiny: bool) -> dict[str, Any]:
    """Run the tests of gradients, projections and scoring with a GPU at hand, or one file of them."""
    rooms = ["tests/projection/test_sketch.py"] if tiny else ["tests/gradients", "tests/projection", "tests/scoring"]
    return run_tests(["-n", "4", *rooms])


def run_tests(arguments: list[str]) -> dict[str, Any]:
    """Return pytest's last lines; raise if a test failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", *arguments]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = found.stdout.strip().splitlines()[-12:]
    if found.returncode not in (0, 5):  # 5: there was none to run
        raise RuntimeError("\n".join(lines))
    return {"summary": lines[-1] if lines else "no test"}


def exactness(tiny: bool) -> dict[str, Any]:
    """Compare per-sample gradients on the device with a loop over single examples there, in float64."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6) % 10
    vectors, tokens = torch.randn(6, 9, 5, generator=generator), torch.randint(0, 65, (6, 17), generator=generator)
    labels = torch.arange(6) % 3
    works: dict[str, tuple[nn.Module, Any, str]] = {
        "mlp": (mlp(5, 8, 3), (vectors[:, 0], labels), "image_classification"),
        "resnet9": (ResNet9(width=4), images, "image_classification"),
        "decoder": (Decoder(dim=32, layers=2), (tokens[:, :-1], tokens[:, 1:]), "language_modeling"),
        "lstm": (LastOutput(nn.LSTM(5, 6, batch_first=True)), (vectors, labels), "image_classification"),
        "gru": (LastOutput(nn.GRU(5, 6, 2, batch_first=True, bidirectional=True)), (vectors, labels), "classification"),
    }
    return {name: gradient_error(*work) for name, work in works.items()}


class LastOutput(nn.Module):
    """A classifier on the last output of a recurrent layer; cuDNN has no backward of these in eval mode."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(recurrent.hidden_size * (2 if recurrent.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, 5]`` to logits ``[B, 3]``."""
        return self.head(self.recurrent(x)[0][:, -1])


def gradient_error(model: nn.Module, batch: tuple[Tensor, Tensor], task: str) -> float:
    """Return the largest distance of a stored gradient from its own autograd gradient, relative to that one."""
    torch.manual_seed(0)
    model = model.double().eval().to(DEVICE)
    inputs, labels = (each.to(DEVICE) for each in batch)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    folder = tempfile.mkdtemp(prefix="tracer-gpu-")
    try:
        tracer = Tracer(model, task, len(labels), folder, projector="none", storage="float32")
        tracer.load_checkpoint(model.state_dict(), model_id=0)
        tracer.featurize((inputs, labels), num_samples=len(labels))
        tracer.close()
        table = tracer.store.checkpoint(0)
        found = torch.cat([torch.as_tensor(rows.copy()) for _, rows in table.raw_features(0, len(labels))])
        found = found * torch.as_tensor(table.column("loss_grad").copy())[:, None]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    errors = []
    with torch.backends.cudnn.flags(enabled=False):
        for row, gradient in enumerate(found):
            logits = model(inputs[row : row + 1])
            loss = F.cross_entropy(logits.flatten(0, -2), labels[row : row + 1].flatten())
            own = torch.autograd.grad(loss, list(model.parameters()))
            expected = torch.cat([each.flatten() for each in own]).cpu()
            errors.append(float((gradient - expected).norm() / expected.norm()))
    return max(errors)


def fast_jl(tiny: bool) -> dict[str, Any]:
    """Run the self-test of the CUDA projector: inner products, linearity, and batches of any size."""
    from tracer.projection import make_projector

    make_projector("fast_jl", {"weight": (300, 400)}, 1024, 0, DEVICE)
    return {"self_test": "passed"}


def resnet18(tiny: bool) -> dict[str, Any]:
    """ResNet-18's shape from transformers on images of 224 x 224, in bfloat16 autocast."""
    from transformers import ResNetConfig, ResNetForImageClassification

    side, rows = (32, 4) if tiny else (224, 64)
    sizes = [8, 8, 16, 16] if tiny else [64, 128, 256, 512]
    config = ResNetConfig(
        embedding_size=sizes[0], hidden_sizes=sizes, depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000
    )
    batch = torch.randn(rows, 3, side, side, device=DEVICE), torch.randint(0, 1000, (rows,), device=DEVICE)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).logits, batch[1])

    model = ResNetForImageClassification(config).to(DEVICE).eval()
    return Work(model, batch, "image_classification", loss, {"autocast": "bfloat16"}).measure(*settings(tiny))


def gpt2(tiny: bool, tokens: int) -> dict[str, Any]:
    """GPT-2 small, in bfloat16 autocast."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 96} if tiny else {}
    model = GPT2LMHeadModel(GPT2Config(**size, n_positions=tokens)).to(DEVICE).eval()
    return language_work(model, tiny, tokens, 8, {"autocast": "bfloat16"})


def llama(tiny: bool, lora: bool) -> dict[str, Any]:
    """A Llama of a billion parameters in bfloat16, all of them or an adapter of rank 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = (32, 64, 2, 2, 1, 96) if tiny else (2048, 8192, 16, 32, 8, 32_000)
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size",
    )  # fmt: skip
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM(LlamaConfig(**dict(zip(names, shape, strict=True)))).to(torch.bfloat16).eval()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    return language_work(model, tiny, 512, 4, {})


def language_work(model: nn.Module, tiny: bool, tokens: int, rows: int, options: dict[str, Any]) -> dict[str, Any]:
    """Measure a causal language model of transformers on random tokens."""
    tokens, rows = (16, 3) if tiny else (tokens, rows)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(0, vocabulary, (rows, tokens), device=DEVICE)
    batch = {"input_ids": ids, "labels": ids}
    work = Work(model, batch, "language_modeling", lambda model, batch: model(**batch).loss, options)
    return work.measure(*settings(tiny))


def settings(tiny: bool) -> tuple[int, int]:
    """Return the rounds and ``proj_dim``."""
    return (2, 64) if tiny else (7, 4096)


PARTS: dict[str, tuple[Callable[[bool], dict[str, Any]], int]] = {
    "exactness": (exactness, 60),
    "fast_jl": (fast_jl, 40),
    "tests marked gpu": (pytest_marked, 90),
    "resnet18 bf16 224": (resnet18, 60),
    "gpt2 512": (lambda tiny: gpt2(tiny, 512), 60),
    "gpt2 1024": (lambda tiny: gpt2(tiny, 1024), 60),
    "llama 1b lora": (lambda tiny: llama(tiny, True), 80),
    "llama 1b full": (lambda tiny: llama(tiny, False), 80),
}
"""What is run, and within how many seconds: nine minutes in all."""

SUITE = {"tests of three rooms": (whole_suite, 550)}
"""With ``--suite``, instead."""


def run_part(name: str, tiny: bool, seconds: int) -> dict[str, Any]:
    """Run a part in a process of its own; return what it found, or how it failed."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--part", name, *(["--tiny"] if tiny else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"part": name, "error": f"not finished within {seconds} s"}
    row: dict[str, Any] = {"part": name, "seconds": round(time.perf_counter() - start, 1)}
    if done.returncode:
        return {**row, "error": done.stderr.strip()[-1500:]}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Run the parts one after another; the file is written after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="parts whose name has this in it")
    parser.add_argument("--suite", action="store_true", help="three rooms' tests instead, in under ten minutes")
    parser.add_argument("--tiny", action="store_true", help="small sizes; works without a GPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args()
    parts = {**PARTS, **SUITE}
    if options.part:
        torch.manual_seed(0)
        print(json.dumps(parts[options.part][0](options.tiny)))
        return
    if DEVICE.type != "cuda" and not options.tiny:
        parser.error("there is no GPU; --tiny runs small sizes on the CPU")
    rows: list[dict[str, Any]] = []
    for name, (_, seconds) in (SUITE if options.suite else PARTS).items():
        if options.only and options.only not in name:
            continue
        rows.append(run_part(name, options.tiny, seconds))
        print(json.dumps(rows[-1]), flush=True)
        write_results(options.output_dir, "gpu", rows)
    print(machine())


if __name__ == "__main__":
    main()
