"""Models of plain torch that treat layers, weights or examples in an unusual way."""

import pytest
from zoo.harness import check
from zoo.layers_and_weights import LAYERS_AND_WEIGHTS
from zoo.order_of_examples import ORDER_OF_EXAMPLES
from zoo.state_between_forwards import STATE_BETWEEN_FORWARDS
from zoo.tables import params


@pytest.mark.parametrize("entry", params(LAYERS_AND_WEIGHTS, ORDER_OF_EXAMPLES, STATE_BETWEEN_FORWARDS))
def test_gradients_are_those_of_single_examples(entry, recorded, tmp_path):
    recorded(entry, tmp_path / "store")


def test_the_cost_of_an_exact_model_is_measured_in_plain_passes(tmp_path):
    """`make zoo` measures it, and these gates otherwise do not."""
    exact = next(entry for entry in LAYERS_AND_WEIGHTS if not (entry.refused or entry.fault))
    assert check(exact, tmp_path / "store", timed=True).cost > 0
