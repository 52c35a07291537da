"""The command line, ``tracer``: `attribute`, `Tracer` and the store's questions without a script.

One module for each command. Importing this package imports click alone; a command's module is imported when the command
or its help is requested.
"""

from tracer.cli.app import main

__all__ = ["main"]
