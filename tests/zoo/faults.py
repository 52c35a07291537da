"""Known faults, for which entries fail today."""

NOISE = "float32 inside a float64 model: a gradient that is rounding noise is compared at float64's tolerance"
UNMASKED = "padding without a mask is not seen: an example that is run alone keeps its padding"
SEGFAULT = "segmentation fault in vmap of a model that converts its own weights"
GIVEN_UP = "a layer whose output without rows cannot be expanded is refused, where the fallback could do it"
KEPT_GRAPH = "a module keeps a tensor with its graph in eval mode, and the second backward through it fails"
