"""The models of transformers, timm and peft, for `make zoo`; pytest does not collect this file by itself."""

import pytest
import torch
from zoo.audio_and_mixed import AUDIO_AND_MIXED
from zoo.decoders import DECODERS
from zoo.encoders import ENCODERS
from zoo.peft_methods import PEFT_METHODS
from zoo.tables import params
from zoo.timm_models import TIMM_MODELS
from zoo.vision import VISION


@pytest.fixture(scope="session", autouse=True)
def _torchvision():
    """Make torchvision importable; PyPI's wheel is built for CUDA, so its operators do not load beside torch for CPUs.

    transformers and timm import it for their image transforms, which the zoo does not use.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")


@pytest.mark.parametrize("entry", params(DECODERS, ENCODERS, VISION, AUDIO_AND_MIXED, TIMM_MODELS, PEFT_METHODS))
def test_gradients_are_those_of_single_examples(entry, recorded, tmp_path):
    recorded(entry, tmp_path / "store")
