"""Language models and tokenizers by a name on the hub or a directory, with adapters of peft."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tracer.errors import InputError, MissingDependencyError
from tracer.types import Checkpoint

ADAPTER = "adapter_config.json"


def _import(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise MissingDependencyError(f"models by name need {name}: pip install 'tracin[hf]'") from error


def load_language_model(
    name: str, checkpoints: Sequence[Checkpoint] = (), tokenizer: str | None = None, dtype: str = "auto"
) -> tuple[nn.Module, Any]:
    """Return a causal language model or encoder-decoder, and its tokenizer; code in its directory is never executed.

    Args:
        name: The model's name on the hub or its directory; or a directory of adapters, which name their base.
        checkpoints: Paths of checkpoints. If the first is a directory of adapters, the model gets such adapters.
        tokenizer: The tokenizer's name or directory. Default: the model's.
        dtype: The dtype of the weights, for example ``float32``; ``auto``: that in which they were saved.

    Raises:
        InputError: If there is no such model, or it is no language model.
        MissingDependencyError: If transformers or peft is not installed.
    """
    transformers, own = _import("transformers"), _adapter(name)
    adapters = own or next(filter(None, map(_adapter, checkpoints[:1])), None)
    base = _base(name)
    kind = transformers.AutoModelForSeq2SeqLM if is_in_sides(name) else transformers.AutoModelForCausalLM
    model = _loaded(kind.from_pretrained, base, "model", torch_dtype=dtype)
    model.config.use_cache = False
    if adapters is not None:
        model = _with_adapters(model, adapters, own is not None)
    found = load_tokenizer(name, tokenizer)
    known = model.get_input_embeddings().num_embeddings
    if len(found) > known:
        raise InputError(
            f"the tokenizer has {len(found)} tokens and the model has embeddings of {known}; pass the model's own "
            f"tokenizer by tokenizer=."
        )
    return model, found


def is_in_sides(name: str) -> bool:
    """Return whether a model by name is an encoder-decoder, without loading its weights."""
    config = _loaded(_import("transformers").AutoConfig.from_pretrained, _base(name), "model")
    return bool(getattr(config, "is_encoder_decoder", False))


def load_tokenizer(name: str, tokenizer: str | None = None) -> Any:
    """Return the tokenizer by its own name, or that of a model by name: of its adapters, else of their base."""
    place = tokenizer
    if place is None:
        place = name if (Path(name) / "tokenizer_config.json").is_file() else _base(name)
    return _loaded(_import("transformers").AutoTokenizer.from_pretrained, place, "tokenizer")


def own_weights(name: str) -> Path:
    """Return the directory of the weights of a model that was loaded by its name."""
    if Path(name).is_dir():
        return Path(name)
    _import("transformers")
    from transformers.utils.hub import cached_file

    return Path(str(_loaded(cached_file, name, "model", filename="config.json"))).parent


def _adapter(place: Checkpoint) -> Path | None:
    """Return the directory of adapters that a name or checkpoint is; None if it is none."""
    return Path(place) if isinstance(place, (str, Path)) and (Path(place) / ADAPTER).is_file() else None


def _base(name: str) -> str:
    """Return the name of the model that adapters are for, or that of a model itself."""
    if (adapters := _adapter(name)) is None:
        return name
    base = _import("peft").PeftConfig.from_pretrained(str(adapters)).base_model_name_or_path
    if not base:
        raise InputError(
            f"model={name!r} holds adapters that do not name their base; pass the base as the model and this directory "
            f"as a checkpoint."
        )
    return str(base)


def _with_adapters(model: nn.Module, adapters: Path, with_weights: bool) -> nn.Module:
    """Return a model with adapters that may be trained, as a directory has them."""
    peft = _import("peft")
    if with_weights:
        return peft.PeftModel.from_pretrained(model, str(adapters), is_trainable=True)
    config = peft.PeftConfig.from_pretrained(str(adapters))
    config.inference_mode = False
    return peft.get_peft_model(model, config)


def _loaded(load: Callable[..., Any], name: str, what: str, **options: Any) -> Any:
    """Call a loader of transformers, with its error as one sentence."""
    try:
        return load(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"{what}={name!r} cannot be loaded: {' '.join(str(error).split())}. Expected a directory of "
            f"save_pretrained, or a name on the hub of a causal language model or encoder-decoder."
        ) from error
