"""Models of plain torch that treat layers, weights or examples in an unusual way."""

import pytest
from zoo.layers_and_weights import LAYERS_AND_WEIGHTS
from zoo.order_of_examples import ORDER_OF_EXAMPLES
from zoo.state_between_forwards import STATE_BETWEEN_FORWARDS
from zoo.tables import params


@pytest.mark.parametrize("entry", params(LAYERS_AND_WEIGHTS, ORDER_OF_EXAMPLES, STATE_BETWEEN_FORWARDS))
def test_gradients_are_those_of_single_examples(entry, recorded, tmp_path):
    recorded(entry, tmp_path / "store")
