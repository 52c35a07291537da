"""Scripts in forks behave as in processes of their own."""

from __future__ import annotations

import pytest
from forks import fork, ranks

SCRIPT = """
import atexit, os, sys
print(*sys.argv[1:], os.environ["WORD"], os.getcwd())
atexit.register(print, "last words")
if sys.argv[1] == "raise":
    raise ValueError("no")
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_gets_arguments_variables_and_its_folder_and_says_how_it_ended(script, tmp_path):
    for argument, status in (("0", 0), ("3", 3), ("raise", 1)):
        running = fork(script, argument, cwd=tmp_path, WORD="hello")
        assert running.wait() == status
        assert running.output.startswith(f"{argument} hello {tmp_path}\n")
        assert running.output.endswith("last words\n")
        assert ("ValueError: no" in running.output) == (argument == "raise")


def test_a_script_that_hangs_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import time\ntime.sleep(100)")
    assert fork(script, cwd=tmp_path).wait(0.1) == -9


def test_ranks_run_at_once_and_know_each_other(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "ranks = torch.tensor([dist.get_rank()])\n"
        "dist.all_reduce(ranks)\n"
        "print(dist.get_world_size(), ranks.item())\n"
    )
    running = ranks(3, script, cwd=tmp_path)
    assert [each.wait() for each in running] == [0, 0, 0]
    assert [each.output for each in running] == ["3 3\n"] * 3
