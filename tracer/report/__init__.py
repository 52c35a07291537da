"""Reports of influence scores: one self-contained page to look through, CSV tables, PNG figures, top rows as files.

Plain arrays come in, so scores of any origin can be shown. `samples` knows how an input looks, `content` checks,
`health` estimates wrong labels and `recommendations` says what follows; `charts`, `sections` and `page` write HTML,
`payload` and `thumbnails` what its scripts (assets/) work on; `drawing`, `montage` and `tables` make the files beside
it, and `writer` joins them.
"""

from tracer.report.writer import write_report

__all__ = ["write_report"]
