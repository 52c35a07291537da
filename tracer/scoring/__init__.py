"""From stored features to scores: estimators, kernels, streaming products, strongest examples."""
