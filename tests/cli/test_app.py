"""The program: its help, errors and exit codes, completion, the template."""

from __future__ import annotations

import logging
import subprocess
import sys
import tomllib

import pytest
from cli_cases import refused, run_tracer
from click.shell_completion import get_completion_class

from tracer.cli import info, main
from tracer.cli.app import COMMANDS
from tracer.cli.settings import SETTINGS, read_settings
from tracer.errors import InputError


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_commands_help_begins_as_listed_and_has_examples(name):
    result = run_tracer(name, "--help")
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    assert COMMANDS[name][1] in words
    assert f"tracer {name}" in words.partition("Examples:")[2]


def test_help_lists_all_commands_and_the_first_steps():
    output = run_tracer("--help").output
    assert [name for name in COMMANDS if f"\n  {name}  " not in output] == []
    assert "First steps:" in output
    assert "130 interrupted" in " ".join(output.split())


def test_version_and_that_the_list_of_commands_imports_none_of_them():
    code = (
        "import sys; from tracer.cli import main\n"
        "main(['--help'], standalone_mode=False); main(['--version'], standalone_mode=False)\n"
        "print(*sorted(name for name in sys.modules if name.startswith('tracer.cli.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    import tracer

    *_, version, modules = done.stdout.splitlines()
    assert version == f"tracer {tracer.__version__}"
    assert modules.split() == ["tracer.cli.app"]


def test_an_unknown_command_is_bad_usage():
    assert "No such command" in refused("topp")


def test_our_errors_are_one_message():
    assert refused("info", "nothing-here").startswith("Error: ")
    assert "holds no store" in refused("info", "nothing-here")


def test_debug_shows_the_traceback():
    result = run_tracer("--debug", "info", "nothing-here")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.output
    assert "StoreError" in result.output


def test_other_errors_have_their_own_code_and_say_how_to_see_more(monkeypatch):
    monkeypatch.setattr(info, "open_store", lambda store: 1 / 0)
    result = run_tracer("info", "a store")
    assert result.exit_code == 3
    assert "Unexpected ZeroDivisionError: division by zero" in result.output
    assert "tracer --debug info 'a store'" in result.output
    assert "Traceback" not in result.output


def test_a_program_that_is_ended_by_other_code_says_so(monkeypatch):
    monkeypatch.setattr(info, "open_store", lambda store: sys.exit(0))
    result = run_tracer("info", "store")
    assert result.exit_code == 3
    assert "Unexpected SystemExit: 0" in result.output


def test_errors_of_the_system_are_one_message(monkeypatch):
    def refuse(store):
        raise PermissionError(13, "Permission denied", store)

    monkeypatch.setattr(info, "open_store", refuse)
    assert "Permission denied: 'somewhere'" in refused("info", "somewhere")


def test_an_interruption_anywhere_ends_with_130(monkeypatch):
    def interrupt(store):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "open_store", interrupt)
    result = run_tracer("info", "store")
    assert (result.exit_code, result.output) == (130, "Interrupted.\n")


def test_verbose_shows_what_the_library_logs():
    logger = logging.getLogger("tracer")
    before = logger.level
    try:
        run_tracer("-v", "info", "nothing-here")
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(before)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_the_shell(shell):
    result = run_tracer("completion", shell)
    assert result.exit_code == 0
    assert f"_TRACER_COMPLETE={shell}_complete" in result.output


def test_completion_knows_commands_options_and_choices():
    shell = get_completion_class("bash")(main, {}, "tracer", "_TRACER_COMPLETE")
    assert [item.value for item in shell.get_completions([], "self")] == ["self-influence"]
    assert "--proj-dim" in [item.value for item in shell.get_completions(["run"], "--pro")]
    assert [item.value for item in shell.get_completions(["top", "--estimator"], "tr")] == [
        "tracin",
        "trak",
        "trackstar",
    ]


def test_the_template_sets_what_is_required_and_shows_all_else(tmp_path):
    assert run_tracer("init").exit_code == 0
    text = (tmp_path / "tracer.toml").read_text()
    required = {setting.name for setting in SETTINGS if setting.required}
    assert set(tomllib.loads(text)) == required
    assert "replaces rates that a recorder wrote" in " ".join(text.replace("\n# ", " ").split())
    uncommented = "\n".join(
        line.removeprefix("# ") for line in text.splitlines() if " = " in line and not line.startswith("# Settings")
    )
    lines = [line for line in uncommented.splitlines() if line.partition(" = ")[0].isidentifier()]
    (tmp_path / "all.toml").write_text("\n".join(lines))
    assert set(read_settings("all.toml", {})) == {setting.name for setting in SETTINGS}


def test_init_replaces_a_file_only_by_force(tmp_path):
    (tmp_path / "mine.toml").write_text("seed = 1")
    assert "exists already; choose another name, or pass --force" in refused("init", "mine.toml")
    assert (tmp_path / "mine.toml").read_text() == "seed = 1"
    assert run_tracer("init", "mine.toml", "--force").exit_code == 0
    assert "build_model" in (tmp_path / "mine.toml").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("proj_dims = 3", "unknown key 'proj_dims'; did you mean 'proj_dim'"),
        ("[model]\nname = 'x'", "model is {'name': 'x'}; expected a text"),
        ("proj_dim = 'many'", "proj_dim is 'many'; expected a whole number"),
        ("proj_dim = true", "proj_dim is True; expected a whole number"),
        ("resume = 1", "resume is 1; expected true or false"),
        ("params = [1]", "params is \\[1\\]; expected a text or a list of texts"),
        ("learning_rate = ['a']", "expected a number or a list of numbers"),
        ("batch_size = 9223372036854775808", "batch_size is 9223372036854775808; expected at most 9223372036854775807"),
        ("estimator = 'tracing'", "estimator is 'tracing'; did you mean 'tracin'"),
        ("model: x", "is not valid TOML"),
    ],
)
def test_a_file_of_settings_is_checked(tmp_path, text, message):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises((InputError, TypeError), match=message):
        read_settings("run.toml", {})


def test_a_file_that_is_not_there_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "There is no file run.toml; `tracer init run.toml` writes a file" in refused("run", "run.toml")
    (tmp_path / "runs").mkdir()
    said = " ".join(refused("build", "runs", "--model", "m").split())
    assert "runs is a directory; `tracer init --build settings.toml` writes a file of settings" in said
    assert said.endswith("The store is named by --out.")
