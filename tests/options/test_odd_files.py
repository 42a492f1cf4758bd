"""Any file of options, however odd: a Config, or one line. Fields, types, duplicates; and what is no file."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resist_ds.errors import UserError
from resist_ds.options.command_line import parse
from resist_ds.options.config import CHOICES, FIELDS, Config
from resist_ds.options.deepspeed_fields import ZERO_PASSED_ON


def answer(*argv: str) -> str | Config:
    """A Config, or the one line that a user reads."""
    try:
        return parse(argv)
    except UserError as error:
        said = str(error)
        assert said and said.isprintable() and len(said) < 3000, said
        return said


def fuzzed(examples: int) -> settings:
    return settings(max_examples=examples, derandomize=True, database=None)


# ------------------------------------------------------------------------------------------------------------
# JSON.

ODD = [
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-0",
        "1e400",
        "9" * 30,
        "9" * 5000,
        "1e18",
        "2.0",
        "2.5",
        "-1",
    ),
    *("true", "false", "null", '"auto"', '"AUTO"', '"0.1"', '""', '"\\ud800"', '"a\\nb"', '"none"', '"cpu"'),
    *("[]", "{}", "[0.8, 0.999]", '["auto", 2]', "[1e400, 1]", '{"enabled": true}', '{"enabled": "no"}', "0"),
    *('{"type": "AdamW", "params": {"lr": "auto"}}', '{"device": "cpu"}', '{"stage": 2}', '{"a": 1, "a": 2}'),
]
SECTIONS: dict[str, list[str]] = {
    "bf16": ["enabled", "check_grad_overflow", "loss_scale"],
    "fp16": ["enabled", "loss_scale"],
    "optimizer": ["type", "params", "legacy_fusion"],
    "scheduler": ["type", "params"],
    "params": [
        *("lr", "betas", "eps", "momentum", "nesterov", "weight_decay", "torch_adam", "foo"),
        *("warmup_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_type", "total_num_steps"),
    ],
    "zero_optimization": [
        *("stage", "offload_optimizer", "offload_param", "cpu_offload", "zenflow"),
        *("max_live_parameters", *ZERO_PASSED_ON),
    ],
    "offload_optimizer": ["device", "pin_memory", "ratio", "nvme_path"],
    "tensorboard": ["enabled", "output_path"],
    "activation_checkpointing": ["partition_activations", "number_checkpoints"],
}
TOP = [
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "amp", "no\nsuch"),
    *("gradient_clipping", "steps_per_print", "bfloat16", "prescale_gradients", "x" * 500, "\ud800"),
]
TYPES = ['"SGD"', '"Adam"', '"AdamW"', '"WarmupLR"', '"WarmupDecayLR"', '"WarmupCosineLR"']


def text_of(field: str) -> st.SearchStrategy[str]:
    """A field's value, as it stands in a file: mostly what is expected there, or anything."""
    odd = st.sampled_from(ODD)
    if field in SECTIONS:
        return st.one_of(section(SECTIONS[field]), section(SECTIONS[field]), odd)
    return st.one_of(odd, st.sampled_from(TYPES)) if field == "type" else odd


def section(names: list[str]) -> st.SearchStrategy[str]:
    """An object of some of these fields, one or another of them twice."""

    def pair(name: str) -> st.SearchStrategy[str]:
        return text_of(name).map(lambda value: f"{json.dumps(name)}: {value}")

    pairs = st.lists(st.sampled_from(names).flatmap(pair), max_size=4)
    return pairs.map(lambda each: "{" + ", ".join(each) + "}")


@fuzzed(100)
@given(section([*SECTIONS, *TOP]))
def test_any_json_is_a_config_or_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.json"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    found = answer("--deepspeed_config", str(file))
    assert isinstance(found, Config) or str(file) in found


# ------------------------------------------------------------------------------------------------------------
# YAML.

WORDS = [
    *(
        "1e-3",
        "1:30",
        "2024-01-01",
        "yes",
        "no",
        "~",
        "null",
        "0x1F",
        "0o7",
        "010",
        "1_000",
        ".inf",
        ".NaN",
        "-1",
    ),
    *(
        "[1, 2]",
        "[0.8, 0.99]",
        "{a: 1}",
        "'x'",
        '"a\\nb"',
        "!!int 3",
        "!!binary aGk=",
        "!foo 3",
        "&a 3",
        "*a",
    ),
    *(
        "|\n  two\n  lines",
        "",
        "# nothing",
        "@x",
        "%x",
        "\t3",
        "9" * 5000,
        "[a, [b]]",
        "2",
        "0.5",
        "auto",
        "\x07",
    ),
]


@fuzzed(100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*FIELDS, "<<", "? [a]", "1", "yes", '"a\\nb"', "", "&k lr", "*k", "y" * 500]),
            st.one_of(
                st.sampled_from(WORDS), st.sampled_from([c for each in CHOICES.values() for c in each])
            ),
        ),
        max_size=4,
    )
)
def test_any_yaml_is_a_config_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str]]
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_text("\n".join(f"{name}: {value}" for name, value in lines), encoding="utf-8")
    answer("--config", str(file))


# ------------------------------------------------------------------------------------------------------------
# What no fuzzing writes.

DEEP = '{"a": ' * 40 + "1" + "}" * 40


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"steps_per_print": Infinity}', "FILE: steps_per_print is no finite number: write one"),
        ('{"optimizer": {"params": {"betas": [NaN, 1]}}}', "FILE: optimizer.params.betas[0] is no finite"),
        ('{"a": {"b": 1, "b": 1}, "a": 2}', "FILE: a is given twice: remove one of them"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "FILE: bf16.enabled is given twice"),
        ('{"gradient_clipping": ' + "9" * 5000 + "}", "FILE: gradient_clipping is no finite number"),
        ('{"gradient_clipping": 1' + "0" * 30 + "}", "FILE: gradient_clipping is 1e+30: write a number"),
        (DEEP, "FILE: a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a… is nested too deeply"),
        ("[" * 100_000, "--deepspeed_config FILE is nested too deeply"),
        ("", "--deepspeed_config FILE is not JSON: Expecting value: line 1 column 1"),
        ('"x"', "--deepspeed_config FILE is no JSON object: write {} around its fields"),
        ('{"a\\nb\\u0007": true}', "FILE: a\\nb\\x07 cannot be honoured"),
    ],
)
def test_json_that_only_some_readers_take(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text)
    said = answer("--deepspeed_config", str(file))
    assert isinstance(said, str) and said.replace(str(file), "FILE").startswith(words)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_any_encoding_that_says_what_it_is(encoding: str, tmp_path: Path) -> None:
    """PowerShell writes UTF-16, other editors a mark in front of UTF-8."""
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 0.5}', encoding=encoding)
    (tmp_path / "run.yaml").write_text("lr: 0.7  # größer\n", encoding=encoding)
    found = parse(["--config", str(tmp_path / "run.yaml"), "--deepspeed_config", str(tmp_path / "ds.json")])
    assert (found.clip_grad, found.lr) == (0.5, 0.7)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("option", ["--config", "--deepspeed_config"])
def test_what_is_no_file(option: str, tmp_path: Path) -> None:
    """A pipe without a writer would be waited for, a device read for ever."""
    pipe, large = str(tmp_path / "pipe"), tmp_path / "large"
    os.mkfifo(pipe)
    large.touch()
    os.truncate(large, 1 << 40)
    assert (
        answer(option, pipe)
        == f"{option} {pipe} is a pipe or a device: type a file, which every rank can read"
    )
    assert "is a pipe or a device" in str(answer(option, "/dev/zero"))
    assert (
        answer(option, str(large))
        == f"{option} {large} has 1,099,511,627,776 bytes: that is no file of options"
    )
    assert answer(option, str(tmp_path)) == f"{option} {tmp_path} cannot be read: Is a directory"
    assert "cannot be read: File name too long" in str(answer(option, "x" * 300 + "/y"))
    assert "cannot be read: " in str(answer(option, "~nobody-of-that-name/x"))
    assert answer(option, "a\nb\x00") == f"{option} a\\nb\\x00 cannot be read: embedded null byte"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("checkpoint_minutes: 1:30", "run.yaml:1: checkpoint_minutes is '1:30': type a number or null"),
        ("rounds: 1:2:3", "run.yaml:1: rounds is '1:2:3': type a whole number or null"),
        ('"a\\nb": 1', "run.yaml:1: a\\nb is an unknown option"),
        ("y" * 500 + ": 1", "run.yaml:1: " + "y" * 57 + "… is an unknown option"),
        ("rounds: " + "9" * 5000, "run.yaml:1: rounds is '" + "9" * 56 + "…: type a whole number or null"),
        ("lr: &a 1\n*a : 2", "run.yaml:1: 1 is an unknown option"),
        ("lr: &a [*a]", "run.yaml:1: lr has a list: type a number"),
        ("lr:\t- 1", "--config run.yaml cannot be read"),
        ("[" * 3000, "--config run.yaml cannot be read: it is nested too deeply"),
        ('output_dir: "a\\0b"', "run.yaml:1: output_dir is 'a\\x00b', which no file or name can hold"),
        ('run_name: "\\uD800"', "run.yaml:1: run_name is '\\ud800', which no file or name can hold"),
        ("betas: [0.9]", "--betas is '0.9': type two numbers"),
        ("betas: [[0.9], 0.99]", "run.yaml:1: betas has a list: type a text"),
    ],
)
def test_odd_yaml(text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    assert str(answer("--config", "run.yaml")).startswith(words)


def test_many_digits_beside_a_deepspeed_file(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{}")
    said = answer("--deepspeed_config", str(tmp_path / "ds.json"), "--accumulation_steps", "9" * 5000)
    assert str(said).startswith("--accumulation_steps is '99")
