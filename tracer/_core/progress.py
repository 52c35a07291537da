"""Progress bars: on terminals, and as widgets in notebooks."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a notebook without ipywidgets, which gets the bars of a terminal
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
