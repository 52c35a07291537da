"""The models of transformers, timm and peft, for `make zoo`; pytest does not collect this file by itself."""

import pytest
from zoo.audio_and_mixed import AUDIO_AND_MIXED
from zoo.decoders import DECODERS
from zoo.encoders import ENCODERS
from zoo.peft_methods import PEFT_METHODS
from zoo.tables import make_torchvision_importable, params
from zoo.timm_models import TIMM_MODELS
from zoo.vision import VISION


@pytest.fixture(scope="session", autouse=True)
def _torchvision():
    make_torchvision_importable()


@pytest.mark.parametrize("entry", params(DECODERS, ENCODERS, VISION, AUDIO_AND_MIXED, TIMM_MODELS, PEFT_METHODS))
def test_gradients_are_those_of_single_examples(entry, recorded, tmp_path):
    recorded(entry, tmp_path / "store")
