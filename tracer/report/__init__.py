"""Reports of influence scores: one self-contained page, CSV tables, PNG figures, and the top examples as files.

`write_report` takes plain arrays, so it shows scores of any origin. `samples` and `content` check them, `summaries`,
`health` and `recommendations` analyze them; `page` and ``templates/`` write HTML, `payload` the data of its scripts
(``assets/``); `charts` draws each `figure` once, `png` and `tables` write files.
"""

from tracer.report.writer import ReportOptions, write_report

__all__ = ["ReportOptions", "write_report"]
