"""docs/cli.md: its session runs as it is written, and its tables have every command, setting and exit code."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import enter, run_tracer

from tracer.cli import app
from tracer.cli.settings import SETTINGS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def shape(text: str) -> str:
    """A text without what differs between machines: numbers, spaces, and where the folder is."""
    text = re.sub(r"-?\d[\d,.]*(e-?\d+)?", "N", text.replace(str(Path.cwd()), "/home/me/digits"))
    text = re.sub(r"(time|peak memory|made with|on disk) .*", r"\1", text)
    return " ".join(text.split())


def test_the_session_prints_what_the_page_says(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("pyarrow")
    enter(tmp_path, monkeypatch)
    monkeypatch.delitem(sys.modules, "training", raising=False)
    (source,), (settings,) = blocks("py"), blocks("toml")
    (tmp_path / "training.py").write_text(source)
    (tmp_path / "tracer.toml").write_text(settings)
    commands = [part.partition("\n") for block in blocks("console") for part in block.split("$ ")[1:]]
    assert len(commands) > 10
    for command, _, printed in commands:
        program, *arguments = shlex.split(command)
        if program == "python":
            with torch.random.fork_rng():
                exec(compile(source, "training.py", "exec"), {"__name__": "__main__"})
            continue
        result = run_tracer(*arguments)
        assert result.exit_code == 0, result.output
        assert shape(result.output) == shape(printed), command


def test_every_command_setting_and_exit_code_is_in_its_table():
    assert [name for name in app.COMMANDS if f"| `tracer {name}" not in PAGE] == []
    settings = PAGE[PAGE.index("## Settings") : PAGE.index("## Stopping")]
    assert [setting.name for setting in SETTINGS if f"`{setting.name}`" not in settings] == []
    codes = (app.FINDING, app.BAD_INPUT, app.UNEXPECTED, app.INTERRUPTED)
    assert [code for code in codes if f"\n| {code} | " not in PAGE] == []
