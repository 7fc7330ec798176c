"""Settings from YAML files and flags."""

import dataclasses
import math
import pwd
from dataclasses import dataclass
from typing import Literal

import pytest

from eval_hellaswag import HellaSwagConfig
from modeling_gpt2_repro.commands.convert import ConvertConfig
from modeling_gpt2_repro.commands.plots import PlotsConfig
from modeling_gpt2_repro.commands.publish import PublishConfig
from modeling_gpt2_repro.commands.sample import SampleConfig
from modeling_gpt2_repro.commands.summary import SummaryConfig
from modeling_gpt2_repro.core.arguments import Config, parse_arguments, setting, write_config
from modeling_gpt2_repro.core.errors import UserError, reports_user_errors
from modeling_gpt2_repro.data.prepare.config import PrepareConfig
from modeling_gpt2_repro.training.config import TrainingConfig


@dataclass
class Settings(Config):
    learning_rate: float = setting(6e-4, "peak", heading="schedule", above=0, resumable=False)
    n_tokens: int = setting(1000, "tokens", heading="the rest", least=1, most=10_000)
    n_steps: int | None = setting(None, "updates")
    mode: Literal["auto", "on"] = setting("auto", "how")
    prompt: str = setting("Hello", "text")
    files: list[str] = setting([], "paths")
    push: bool = setting(False, "whether")
    folder: str = setting("runs", "where", path=True)
    file: str | None = setting(None, "which", path=True)
    inputs: list[str] = setting([], "from where", path=True)
    share: float | None = setting(None, "part", least=0, below=math.inf)


def parse(*argv: str) -> Settings:
    return parse_arguments(Settings, argv, description="", foreign_flags={"lr": "use --learning_rate"})


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    (tmp_path / "s.yaml").write_text("learning_rate: 1e-3\nn_tokens: 5e3\npush: true\nfiles: [a, b]\nn_steps: null\n")
    settings = parse("--config", str(tmp_path / "s.yaml"), "--learning_rate=2")
    assert settings == Settings(learning_rate=2.0, n_tokens=5000, push=True, files=["a", "b"])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_from_windows_are_read(end, encoding, tmp_path):
    (tmp_path / "s.yaml").write_bytes(end.join(["", "prompt: é", "", "files: [a, b]", "n_steps: 3"]).encode(encoding))
    assert parse("--config", str(tmp_path / "s.yaml")) == Settings(prompt="é", files=["a", "b"], n_steps=3)


def test_a_file_in_another_encoding_is_rejected(tmp_path):
    (tmp_path / "s.yaml").write_bytes("prompt: é".encode("cp1252"))
    with pytest.raises(UserError, match=r"cannot read --config .*s\.yaml: 'utf-8' codec can't decode byte 0xe9"):
        parse("--config", str(tmp_path / "s.yaml"))


def test_yaml_booleans_stay_strings_in_text_settings(tmp_path):
    (tmp_path / "s.yaml").write_text("mode: on\npush: yes\n")
    assert parse("--config", str(tmp_path / "s.yaml")) == Settings(mode="on", push=True)


def test_settings_survive_a_round_trip(tmp_path):
    settings = Settings(prompt="a: 'b' -- é\n", files=["x y"], n_steps=3, push=True)
    write_config(settings, tmp_path / "s.yaml")
    assert parse(f"--config={tmp_path / 's.yaml'}") == settings


@pytest.mark.parametrize(
    "argv",
    [
        *(f"--prompt={text}" for text in ("null", "~", "", ".inf", "--push", "-", "a\n\n  b ", "#x", "\u2028")),
        "--learning_rate=inf",
        "--learning_rate=1e-30",
    ],
)
def test_unusual_values_survive_a_round_trip(argv, tmp_path):
    write_config(parse(argv), tmp_path / "s.yaml")
    assert parse(f"--config={tmp_path / 's.yaml'}") == parse(argv)


@pytest.mark.parametrize(
    "path, expanded",
    [
        ("~/x", "HOME/x"),
        ("~", "HOME"),
        ("~/", "HOME/"),
        ("~/a b/~", "HOME/a b/~"),
        ("~root/x", "/root/x"),
        *((each, each) for each in ("./~/x", "a/~/x", "gpt2", "openai-community/gpt2", "auto", "", "a~")),
    ],
)
def test_a_leading_tilde_is_expanded_in_paths_only(path, expanded, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    expanded = expanded.replace("HOME", str(tmp_path))
    wanted = Settings(folder=expanded, file=expanded, inputs=[expanded, expanded], prompt=path, files=[path])
    flags = [f"--folder={path}", "--file", path, "--inputs", path, path, f"--prompt={path}", "--files", path]
    assert parse(*flags) == wanted
    (tmp_path / "s.yaml").write_text(
        "".join(f"{name}: '{path}'\n" for name in ("folder", "file", "prompt"))
        + "".join(f"{name}: {values}\n" for name, values in (("inputs", [path, path]), ("files", [path])))
    )
    assert parse("--config", "~/s.yaml") == parse("--config=~/s.yaml") == wanted
    write_config(wanted, tmp_path / "t.yaml")
    assert parse("--config=~/t.yaml") == wanted


def test_a_bare_tilde_in_a_file_is_null(tmp_path):
    (tmp_path / "s.yaml").write_text("folder: ~\nfile: ~\n")
    assert parse("--config", str(tmp_path / "s.yaml")) == Settings()


def test_an_unknown_home_folder_is_reported(monkeypatch):
    def has_no_entry(_):
        raise KeyError

    for argv in (["--folder=~nobody-of-this-name/x"], ["--config", "~nobody-of-this-name"], ["--folder=~\0"]):
        with pytest.raises(UserError, match=r"~nobody-of-this-name|null"):
            parse(*argv)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", has_no_entry)  # as in a container whose user id has no name
    with pytest.raises(UserError, match="~/x: the home folder ~ is unknown"):
        parse("--inputs", "a", "~/x")


COMMANDS = [ConvertConfig, PlotsConfig, PublishConfig, SampleConfig, SummaryConfig]
SCRIPTS = [TrainingConfig, PrepareConfig, HellaSwagConfig, *COMMANDS]
NO_PATHS = {"run_name", "hub_model_id", "repo_id", "wandb_project", "document_separator", "text_column", "revision"}
NO_PATHS |= {"prompt", "sample_prompt", "report_to", "model_size", "micro_batch_size", "skip_steps", "split", "task"}
NO_PATHS |= {"dataset_config_name"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_text_setting_is_a_path_or_listed_as_none(script):
    texts = [field for field in dataclasses.fields(script) if field.type in (str, str | None, list[str])]
    assert {field.name for field in texts if not field.metadata["path"]} <= NO_PATHS
    assert not {field.name for field in texts if field.metadata["path"]} & NO_PATHS


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--learning_rat=1"], "did you mean --learning_rate?"),
        (["--lr=1"], "unknown setting --lr: use --learning_rate"),
        (["--zzz"], "unknown setting --zzz"),
        (["--n_tokens=inf"], "invalid int value: 'inf'"),
        (["--files", "a", "--files", "b"], "--files is given twice"),
        (["--n_tokens=1.5"], "invalid int value: '1.5'"),
        (["--n_tokens"], "expected one argument"),
        (["--mode=off"], "invalid choice: 'off'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config=missing.yaml"], "cannot read --config missing.yaml"),
    ],
)
def test_mistakes_are_explained(argv, message):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("- a\n- b\n", "`name: value` lines"),
        ("a: [", "is not valid YAML"),
        ("learning_rat: 1", "did you mean learning_rate?"),
        ("lr: 1", "use --learning_rate"),
        ("prompt: {a: b}", "prompt must be a single value or a list"),
        ("n_tokens: many", "invalid int value: 'many'"),
        ("!!python/object/apply:os.system [true]", "`name: value` lines"),
    ],
)
def test_mistakes_in_a_file_are_explained(text, message, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        parse(f"--config={tmp_path / 's.yaml'}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--learning_rate=0", "--learning_rate must be above 0, not 0.0"),
        ("--learning_rate=nan", "--learning_rate must be above 0, not nan"),
        ("--n_tokens=0", "--n_tokens must be 1 or more, not 0"),
        ("--n_tokens=1e6", "--n_tokens must be 10,000 or less, not 1000000"),
        ("--share=inf", "--share must be finite, not inf"),
        ("--share=-1", "--share must be 0 or more, not -1.0"),
    ],
)
def test_a_number_out_of_bounds_is_rejected_in_flags_and_files(flag, message, tmp_path):
    name, value = flag.removeprefix("--").split("=")
    (tmp_path / "s.yaml").write_text(f"{name}: {value}")
    for argv in ([flag], ["--config", str(tmp_path / "s.yaml")]):
        with pytest.raises(UserError) as error:
            parse(*argv)
        assert str(error.value) == message


def test_settings_declare_whether_they_affect_the_result():
    assert parse("--learning_rate=1", "--n_tokens=2").experiment == {"learning_rate": 1.0}


@dataclass
class Positional(Config):
    runs: list[str] = setting([], "run folders", positional=True, path=True, metavar="RUN")
    hours: bool = setting(False, "whether")


def test_positional_paths_need_no_flag(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = Positional(runs=["a", f"{tmp_path}/b"], hours=True)
    for argv in (["a", "~/b", "--hours"], ["--hours", "a", "~/b"], ["--hours", "yes", "a", "~/b"]):
        assert parse_arguments(Positional, argv, description="") == wanted
    with pytest.raises(UserError, match="RUN"):
        parse_arguments(Positional, ["--hours"], description="")
    (tmp_path / "settings.yaml").write_text("runs: [a]\n")
    for argv in (["a", "--runs=b"], ["a", f"--config={tmp_path}/settings.yaml"]):
        with pytest.raises(UserError, match=r"unknown setting (--)?runs \(see --help"):
            parse_arguments(Positional, argv, description="")
    with pytest.raises(SystemExit):
        parse_arguments(Positional, ["--help"], description="", prog="plots")
    assert "usage: plots RUN [RUN ...]" in capsys.readouterr().out


def test_help_groups_flags_under_headings(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    places = [text.index(each) for each in ("schedule:", "--learning_rate", "the rest:", "--n_tokens", "--prompt")]
    assert places == sorted(places)


def test_help_shows_each_flag_once_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert text.count("--learning_rate") == 1
    assert "--learning-rate" not in text
    assert "peak (default: 0.0006)" in text


def test_user_errors_become_one_line_and_bugs_keep_their_traceback(capsys):
    @reports_user_errors
    def main(argv=None):
        raise argv[0]

    assert main([UserError("wrong\n  so do that")]) == 2
    captured = capsys.readouterr()
    assert captured.err.endswith(": error: wrong so do that\n") and captured.err.count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        main([ZeroDivisionError()])
