"""Reports of influence scores: PNG figures, a CSV file and one self-contained HTML page.

Plain arrays come in, so scores of any origin can be shown. `samples` knows how an input looks, `recovery` counts
found rows, `figures` and `montage` draw, `page` writes HTML and `writer` joins them.
"""

from tracer.report.writer import write_report

__all__ = ["write_report"]
