"""The command line, ``tracer``: the library's calls for those who would rather not write them.

One module a command. Importing this package imports click alone; a command's module is imported when the command, or
its help, is asked for.
"""

from tracer.cli.app import main

__all__ = ["main"]
