"""Options: what parses, what each wrong input is answered with, and that asking costs no torch import."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from resist_ds.errors import UserError
from resist_ds.options.command_line import parse
from resist_ds.options.config import SHAPING, Config
from tests import ROOT


@pytest.fixture(autouse=True)
def plain_launch(monkeypatch, tmp_path):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "run.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def error(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(argv)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def changed(*argv: str) -> dict[str, object]:
    """The options that differ from the defaults."""
    defaults = Config().to_dict()
    return {name: value for name, value in parse(argv).to_dict().items() if value != defaults[name]}


# --- what parses


def test_no_arguments_are_the_defaults():
    assert parse([]) == Config()
    assert parse([]).lr == 0.01


def test_argv_defaults_to_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "3"])
    assert parse().lr == 3


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--lr 0.1", {"lr": 0.1}),
        ("--lr=0.1", {"lr": 0.1}),
        ("--lr 1e-3", {"lr": 1e-3}),
        ("--lr 1 --lr 2", {"lr": 2.0}),
        ("--local-steps 3", {"local_steps": 3}),
        ("--local_steps=3", {"local_steps": 3}),
        ("--eval-batch_size=7", {"eval_batch_size": 7}),
        ("--rounds null", {}),
        ("--run-name 12", {"run_name": "12"}),
        ("--run-name=a=b", {"run_name": "a=b"}),
        ("--run-name=--x", {"run_name": "--x"}),
        ("--output_dir a-b/--c-d", {"output_dir": "a-b/--c-d"}),
        ("--run_name 2024-01-01", {"run_name": "2024-01-01"}),
        ("--mixed_precision no", {}),
        ("--log_with none", {"log_with": "none"}),
        ("--nesterov", {"nesterov": True}),
        ("--nesterov --lr 0.1", {"nesterov": True, "lr": 0.1}),
        ("--nesterov=true", {"nesterov": True}),
        ("--compile true --channels-last --progress=false", dict(compile=1, channels_last=1, progress=0)),
        ("--augment false", {"augment": False}),
        ("--augment=false --lr 2", {"augment": False, "lr": 2.0}),
        ("--local_rank=3", {}),
        ("--local-rank 3 --lr 2", {"lr": 2.0}),
        ("--lr 2 --local_rank 1", {"lr": 2.0}),
        ("--local_rank -1", {}),
        # As sweeps and Python's str() write them.
        ("--batch_size=8.0", {"batch_size": 8}),
        ("--batch_size 1e2 --rounds 3.", {"batch_size": 100, "rounds": 3}),
        ("--seed 9007199254740993.0", {"seed": 9007199254740993}),  # no float has that value
        ("--clip_grad=None --rounds None --data_dir none", {}),
        ("--clip_grad 1 --clip_grad null", {}),
        ("--label_smoothing=None --min_blocks None --warmup_rounds None --lr_warmup_steps None", {}),
        ("--augment False --compile=True", {"augment": False, "compile": True}),
        ("--log_with None", {"log_with": "none"}),
        ("--output_dir None", {"output_dir": "None"}),  # any text is a folder
        ("--optimizer adamw --betas 0.8,.99 --eps 1e-6", dict(optimizer="adamw", betas="0.8,0.99", eps=1e-6)),
        ("--betas [0.90,0.999]", {}),
        ("--betas=(.9,.999)", {}),
    ],
)  # fmt: skip
def test_command_line(line, expected):
    assert changed(*line.split()) == expected


def test_numbers_have_the_declared_type():
    assert type(parse(["--epochs", "2"]).epochs) is float
    assert type(parse(["--config", write("epochs: 2")]).epochs) is float


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1e-3", {"lr": 1e-3}),  # plain YAML 1.1 reads a string
        ("mixed_precision: no", {}),  # plain YAML 1.1 reads False
        ("run_name: off", {"run_name": "off"}),
        ("run_name: 12", {"run_name": "12"}),
        ("run_name: 2024-01-01", {"run_name": "2024-01-01"}),
        ("local-steps: 3", {"local_steps": 3}),
        ("augment: false\nprogress: no", {"augment": False, "progress": False}),
        ("rounds: 3\nworkers:\neval_batch_size: ~\nnum_classes: null", {"rounds": 3}),
        ("batch_size: 8.0\nclip_grad:\nrounds: None\naugment: False", {"batch_size": 8, "augment": False}),
        ("", {}),
        ("# only a comment\n", {}),
        ("---\nlr: 2 # why\n", {"lr": 2.0}),
        ("{lr: 2, rounds: 1}", {"lr": 2.0, "rounds": 1}),
        ("optimizer: adamw\nbetas: [0.8, 0.99]", {"optimizer": "adamw", "betas": "0.8,0.99"}),
        ("override: [lr, epochs]", {"override": "lr,epochs"}),
    ],
)
def test_yaml(text, expected):
    assert changed("--config", write(text)) == expected


def test_config_is_read_first_wherever_it_stands():
    first, second = write("lr: 2\nrounds: 2\nepochs: 2", "1.yaml"), write("rounds: 3\nepochs: 3", "2.yaml")
    expected = {"lr": 2.0, "rounds": 3, "epochs": 4.0}
    assert changed("--config", first, "--config", second, "--epochs", "4") == expected
    assert changed("--epochs=4", f"--config={first}", f"--config={second}") == expected
    assert changed("--config", second, "--epochs", "4", "--config", first)["rounds"] == 2


def test_print_config_can_be_read_back(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(
            ["--print-config", "--config", write("mixed_precision: bf16"), "--lr", "1e-3", "--augment=false"]
        )
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert changed("--config", write(printed, "2.yaml")) == dict(
        lr=1e-3, augment=False, mixed_precision="bf16"
    )
    assert list(yaml.safe_load(printed)) == list(Config().to_dict())


def test_to_dict_is_plain_and_complete():
    config = Config(lr=0.3, workers=5)
    assert Config(**config.to_dict()) == config
    assert all(value is None or type(value) in (str, int, float, bool) for value in config.to_dict().values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 2


@pytest.mark.parametrize(
    ("value", "expected"), [("bf16", "bf16"), ("fp16", "fp16"), ("no", "no"), ("", "no")]
)
def test_precision_of_the_launcher_is_the_default(monkeypatch, capsys, value, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
    assert parse([]).mixed_precision == Config().mixed_precision == expected
    assert parse(["--mixed_precision=no"]).mixed_precision == "no"
    assert parse(["--config", write("mixed_precision: fp16")]).mixed_precision == "fp16"
    with pytest.raises(SystemExit):
        parse(["--print_config"])
    assert f"mixed_precision: {expected}" in capsys.readouterr().out.replace("'", "")


def test_unknown_precision_of_the_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "fp8" in error() and "bf16" in error()
    assert parse(["--mixed_precision", "bf16"]).mixed_precision == "bf16"
    with pytest.raises(SystemExit):
        parse(["--help"])


# --- what is refused


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--local_stps 3", "unknown option --local_stps (did you mean --local_steps or --local_steps_max"),
        ("--local-stps=3", "unknown option --local-stps (did you mean --local_steps or --local_steps_max"),
        ("--accumulation 3", "unknown option --accumulation (did you mean --accumulation_steps?)"),
        ("--act true", "unknown option --act (did you mean --activation_checkpointing?)"),
        ("--work 3", "unknown option --work (did you mean --workers"),  # no silent abbreviations
        ("--confg x", "--config"),
        ("--no-augment", "--augment false"),
        ("--no-foo", "unknown option --no-foo"),
        ("--lr.x 3", "unknown option --lr.x"),
        ("-l 3", "unknown option -l"),
        ("--", "unknown option --"),
        ("-", "unknown option -"),
        ("foo", "unexpected 'foo'"),
        ("--lr 1 2", "unexpected '2'"),
        ("--print_config foo", "unexpected 'foo'"),
        ("--print_config=foo", "foo"),
        ("--lr", "--lr needs a value: type a number"),
        ("--lr --rounds 3", "--lr needs a value"),
        ("--config", "--config needs a value: type a YAML file"),
        ("--local_rank", "--local_rank needs a value"),
        ("--lr abc", "--lr is 'abc': type a number"),
        ("--lr null", "--lr is 'null': type a number"),
        ("--lr true", "--lr is 'true': type a number"),
        ("--local_steps 1.5", "--local_steps is '1.5': type a whole number"),
        ("--batch_size=8.5", "--batch_size is '8.5': type a whole number"),
        ("--batch_size=1e999999999", "--batch_size is '1e999999999': type a whole number"),
        ("--batch_size=nan", "--batch_size is 'nan': type a whole number"),
        ("--lr=None", "--lr is 'None': type a number"),
        ("--mixed_precision None", "--mixed_precision is 'None': type one of no, bf16, fp16"),
        ("--local_steps true", "--local_steps is 'true': type a whole number"),
        ("--rounds x", "--rounds is 'x': type a whole number or null"),
        ("--augment maybe", "--augment is 'maybe': type true or false"),
        ("--augment=", "--augment is '': type true or false"),
        ("--augment 1", "--augment is '1': type true or false"),
        ("--optimizer adam", "--optimizer is 'adam': type one of sgd, adamw"),
        ("--mixed_precision fp8", "type one of no, bf16, fp16"),
        ("--lr nan", "--lr is 'nan'"),
        ("--lr .nan", "--lr is nan"),
        ("--lr inf", "--lr is 'inf'"),
        ("--lr .inf", "--lr is inf"),
        ("--lr 1e400", "--lr is inf"),
        ("--lr -1e-3", "--lr is -0.001: type a finite number, at least 0"),
        ("--lr -1", "--lr is -1.0"),
        ("--epochs 0", "--epochs is 0: type a number above 0"),
        ("--batch_size 10 --accumulation_steps 3", "type a divisor of 10"),
        ("--nesterov --momentum 0", "--nesterov"),
        ("--nesterov --optimizer adamw", "--nesterov"),
        ("--dataset cifar10", "--dataset cifar10 needs a folder: type --data_dir FOLDER"),
        ("--dataset imagefolder --data_dir=", "needs a folder"),
        ("--data_dir x", "--data_dir is not for --dataset digits"),
        ("--download", "--download cannot fetch digits"),
        ("--download --dataset imagenet --data_dir x", "--download cannot fetch imagenet"),
        ("--dtype float64 --mixed_precision fp16", "type --mixed_precision no"),
        ("--warmup_rounds 3 --rounds 2", "type at most 2"),
        (
            "--local_steps_max 49",
            "--local_steps_max is 49: type at least 50, --local_steps",
        ),
        ("--local_steps_max 99 --strategy ddp", "--local_steps_max is for --strategy resist and local_sgd"),
        (
            "--local_steps_max 99 --strategy stochastic_depth --min_blocks 1",
            "resist and local_sgd, not for stochastic_depth",
        ),
        ("--betas 0.9", "--betas is '0.9': type two numbers, at least 0 and below 1, such as 0.9,0.999"),
        ("--betas 0.9,0.99,0.999", "--betas is '0.9,0.99,0.999': type two numbers"),
        ("--betas 0.9,1", "--betas is '0.9,1': type two numbers"),
        ("--betas 0.9,nan", "--betas is '0.9,nan': type two numbers"),
        ("--betas 0.9,much", "--betas is '0.9,much': type two numbers"),
        ("--betas 0.8,0.99", "--betas is for --optimizer adamw: leave it out, or type that"),
        ("--eps 1e-6", "--eps is for --optimizer adamw: leave it out, or type that"),
        ("--model=", "--model is empty"),
        ("--output_dir=", "--output_dir is empty"),
        (f"--seed {'9' * 5000}", "--seed is"),
        (
            "--overlap_steps 5 --local_steps 5",
            "--overlap_steps is 5: type less than --local_steps 5",
        ),
        (
            "--overlap_steps 1 --strategy ddp",
            "--overlap_steps is for --strategy resist and local_sgd, not",
        ),
        ("--overlap_steps 1 --deepspeed_config ds_configs/zero1.json", "type --overlap_steps 0"),
        ("--wire compact --strategy zero2", "--wire is for --strategy resist and local_sgd, not for zero2"),
        ("--wire compact --strategy stochastic_depth --min_blocks 2", "--wire is for --strategy resist and"),
        ("--wire compact --dtype float64", "--wire compact writes float32 shorter: type --dtype float32"),
        ("--wire gzip", "type one of exact, compact"),
        ("--team_size x", "--team_size is 'x': type a whole number or auto"),
        ("--team_size null", "--team_size is 'null': type a whole number or auto"),
        ("--team_size", "--team_size needs a value: type a whole number or auto"),
        ("--team_size 0", "--team_size is 0: type a finite number, at least 1"),
        ("--team_size 2 --team_strategy hsdp", "type one of ddp, fsdp, zero1, zero2, zero3"),
        (
            "--team_strategy fsdp",
            "--team_strategy fsdp is for teams of several ranks: type --team_size 2 or more, or --strategy "
            "fsdp for one net on all ranks",
        ),
        *(
            (f"--team_size {size} --strategy {way}", f"and local_sgd, not for {way.split()[0]}, which ")
            for size in ("2", "auto")
            for way in ("ddp", "fsdp", "zero1", "stochastic_depth --min_blocks 2")
        ),
        ("--team_size 2 --team_strategy zero3 --dtype float64", "--team_strategy zero3 computes in float32"),
        (
            "--team_size 2 --team_strategy zero1 --warmup_rounds 1",
            "--warmup_rounds is not for --team_strategy zero1",
        ),
        (
            "--team_size 2 --team_strategy zero2 --overlap_steps 1",
            "--overlap_steps is not for --team_strategy zero2, whose engines show their state between rounds",
        ),
        ("--team_size 2 --team_strategy fsdp --compile", "--compile is not for FSDP2 and DeepSpeed here"),
        ("--team_size auto --team_strategy fsdp --channels_last", "--channels_last is not for FSDP2"),
        (
            "--team_size 2 --team_strategy fsdp --mixed_precision fp16",
            "--mixed_precision fp16 is not for FSDP2",
        ),
        (
            "--team_size 2 --deepspeed_config ds_configs/zero1.json",
            "--deepspeed_config is for --team_strategy zero1 to zero3, not for ddp",
        ),
        (
            "--team_size 2 --team_strategy zero2 --deepspeed_config ds_configs/zero1.json",
            "zero_optimization.stage is 1, and --team_strategy zero2 is ZeRO 2",
        ),
    ],
)
def test_refused(line, message):
    assert message in error(*line.split(" "))


LEAST = dict(
    num_classes=1, img_size=1, data_workers=0, cache_mib=0, gpu_cache_mib=0, workers=1, local_steps=1,
    min_blocks=0, warmup_rounds=0, transit_mib=1, batch_size=1, accumulation_steps=1, rounds=1, lr=0,
    momentum=0, weight_decay=0, label_smoothing=0, clip_grad=0, lr_warmup_steps=0, cpu_threads=0,
    eval_every=0, eval_batch_size=1, eval_memory=1, calibration_samples=1, checkpoint_every=0,
    checkpoint_minutes=0, keep=1, grace=0, seed=0, eps=0, local_steps_max=1,
    overlap_steps=0, team_size=1,
)  # fmt: skip


def test_every_number_has_its_limit():
    numbers = {f.name for f in dataclasses.fields(Config) if str(f.type).split(" |")[0] in ("int", "float")}
    assert numbers == {*LEAST, "epochs"}
    for name, least in LEAST.items():
        kind = {"eps": {"optimizer": "adamw"}, "local_steps_max": {"local_steps": 1}}.get(name, {})
        assert getattr(Config(**{name: least}, **kind), name) == least
        for wrong in (least - 1, math.nan, math.inf, -math.inf):
            with pytest.raises(UserError, match=f"^--{name} is .*: type a finite number, at least {least}"):
                Config(**{name: wrong})


@pytest.mark.parametrize(("name", "wrong"), [("momentum", 1), ("label_smoothing", 1), ("seed", 2**63)])
def test_upper_limits(name, wrong):
    assert f"--{name} is" in error(f"--{name}", str(wrong))
    parse([f"--{name}", str(wrong - 1)])


def test_choices_are_checked_without_the_parser_too():
    for name in (
        "dataset",
        "optimizer_state",
        "checkpoint_errors",
        "on_nan",
        "optimizer",
        "schedule",
        "mixed_precision",
        "dtype",
        "log_with",
        "team_strategy",
    ):
        with pytest.raises(UserError, match=f"^--{name} is 'x': type one of "):
            Config(**{name: "x"})
    with pytest.raises(UserError, match=r"^--team_size is 'x': type a whole number or auto$"):
        Config(team_size="x")


def test_good_combinations_stay_good():
    Config(dataset="cifar100", data_dir="x", download=True)
    Config(nesterov=True)
    Config(batch_size=12, accumulation_steps=3)
    Config(dataset="synthetic", dtype="float64", mixed_precision="no")
    Config(warmup_rounds=2, rounds=2)  # local SGD from beginning to end: the baseline
    Config(warmup_rounds=2)
    Config(local_steps=5, local_steps_max=5)
    Config(local_steps=5, local_steps_max=50, strategy="local_sgd", schedule="cosine")
    Config(team_size=2, strategy="local_sgd", overlap_steps=1, dtype="float64")
    Config(team_size="auto", team_strategy="fsdp", warmup_rounds=1, overlap_steps=1, wire="compact")
    Config(team_size=2, team_strategy="zero3", wire="compact", on_nan="skip", optimizer_state="reset")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds: 1\nlrr: 1", "run.yaml:2: lrr is an unknown option (did you mean lr?)"),
        ("no_augment: true", "(type augment: false)"),
        ("config: other.yaml", "run.yaml:1: config is an unknown option"),
        ("local_rank: 1", "unknown option"),
        ("\nlr: abc", "run.yaml:2: lr is 'abc': type a number"),
        ("lr:", "run.yaml:1: lr has no value: type a number"),
        ("output_dir: null", "output_dir has no value: type a text"),
        ("lr: [1, 2]", "lr has a list: type a number"),
        ("lr: {a: 1}", "lr has a list: type a number"),
        ("lr: 1\nlr: 2", "run.yaml:2: lr is given twice"),
        ("local-steps: 1\nlocal_steps: 2", "local_steps is given twice"),
        ("optimizer: adam", "type one of sgd, adamw"),
        ("momentum: -1", "--momentum is -1.0"),
        ("- lr: 1", "run.yaml: write one option a line"),
        ("lr", "run.yaml: write one option a line"),
        ("3", "run.yaml: write one option a line"),
        ("lr: [1", "--config run.yaml cannot be read"),
        ("lr: 1\n---\nlr: 2", "--config run.yaml cannot be read"),
        ("lr: \0", "--config run.yaml cannot be read"),
        ("? [a]\n: 1", "unknown option"),
        ("<<: {lr: 1}", "unknown option"),
        ("[" * 5000, "--config run.yaml cannot be read"),
        ("run_name: !!python/object/apply:os.system ['touch x']", "run_name has a list"),
    ],
)
def test_yaml_refused(text, message):
    assert message in error("--lr", "3", "--config", write(text))
    assert not Path("x").exists()


def test_yaml_file_refused():
    assert error("--config", "x.yaml") == "--config x.yaml cannot be read: No such file or directory"
    assert error("--config", ".") == "--config . cannot be read: Is a directory"
    Path("b.yaml").write_bytes(b"\xff\xfe\x00lr")
    assert "--config b.yaml cannot be read" in error("--config", "b.yaml")
    assert "cannot be read" in error("--config", "{lr: 3}")  # jsonargparse alone would take it for YAML
    assert "other.yaml:1: lr is 'x'" in error(
        "--config", write("lr: 1"), "--config", write("lr: x", "other.yaml")
    )


# --- help, imports, presets


def test_help_tells_every_option(capsys):
    for argv in (["--help"], ["-h"], ["--lr", "--help"], ["--lr=x", "--no-such", "-h"]):
        with pytest.raises(SystemExit) as caught:
            parse(argv)
        assert caught.value.code == 0
    text = capsys.readouterr().out.rpartition("usage: train.py")[2]
    for field in dataclasses.fields(Config):
        assert f"  --{field.name} " in text
        assert field.metadata["doc"].endswith(".")
    for words in (
        "Protocol:",
        "{travel,reset}",
        "[0.0005]",
        "50 % and",
        "FULL model",
        "[true|false]",
        "[null]",
    ):
        assert words in text
    assert "%%" not in text and "Literal" not in text


def test_help_is_quick_and_loads_no_torch():
    """What takes long are these imports; how long it takes otherwise, 0.2 s here, is the machine's affair."""
    slow = {"torch", "torchvision", "timm", "numpy", "sklearn", "accelerate", "deepspeed", "wandb"}
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print(sorted({slow!r} & sys.modules.keys())))\n"
        "from resist_ds.options.command_line import parse\n"
        "parse(['--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: train.py") and done.stdout.rstrip().endswith("[]")


TRAIN = ("demo", "cifar10", "cifar100", "imagenet", "paper_cifar10", "paper_cifar100", "paper_imagenet")


@pytest.mark.parametrize("name", TRAIN)
def test_presets(name):
    path = ROOT / "ds_configs" / f"{name}.yaml"
    config = parse(["--config", str(path)])
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert given and all(getattr(config, option) == value for option, value in given.items())
    assert config.output_dir == f"runs/{name}"
    assert config.dataset == ("digits" if name == "demo" else name.removeprefix("paper_"))


def test_the_paper_s_own_settings_stay():
    """PAPER: hyper-parameters of the authors' release, and ℓ = 50 after warm-up rounds for ImageNet."""
    for name, lr in (("paper_cifar10", 0.01), ("paper_cifar100", 0.03)):
        config = parse(["--config", name])
        assert config.model == "preact_resnet101" and config.epochs == 160 and config.lr == lr
        assert (config.batch_size, config.momentum, config.weight_decay) == (128, 0.9, 5e-4)
        assert (config.local_steps, config.optimizer_state, config.schedule) == (50, "reset", "step")
        assert (config.wire, config.min_blocks, config.overlap_steps) == ("exact", 0, 0)
    config = parse(["--config", "paper_imagenet"])
    assert config.local_steps == 50 and config.warmup_rounds > 0 and config.wire == "exact"


def test_a_preset_is_found_by_its_name(tmp_path, monkeypatch):
    """Wherever one stands: an installed package has no ds_configs/ beside it. A file of that name wins."""
    monkeypatch.chdir(tmp_path)
    expected = parse(["--config", str(ROOT / "ds_configs" / "demo.yaml")])
    assert parse(["--config", "demo"]) == parse(["--config", "ds_configs/demo.yaml"]) == expected
    (tmp_path / "demo").write_text("lr: 0.7\n")
    assert parse(["--config", "demo"]).lr == 0.7


def test_every_preset_is_known_here():
    names = {path.stem for path in (ROOT / "ds_configs").glob("*.yaml")}
    launches = {"accelerate_cpu", "accelerate_one_node", "accelerate_two_nodes"}  # see test_multi_node.py
    assert names == {*TRAIN, *launches}


@pytest.mark.parametrize("name", ["accelerate_cpu", "accelerate_one_node"])
def test_accelerate_configs_go_through_torchrun(name):
    # With `use_cpu: true` accelerate silently starts a single process.
    given = yaml.safe_load((ROOT / "ds_configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert given["distributed_type"] == "MULTI_GPU" and given["use_cpu"] is False
    assert given["num_processes"] >= 2 and given["main_process_port"] == 0


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (
            ["--override", "lrr"],
            "--override 'lrr': no option of that name shapes training (did you mean lr?)",
        ),
        (["--override", "lr, keep"], "--override 'keep': no option of that name shapes training"),
        (["--resume", ""], "--resume is empty: type never, auto or the folder of a checkpoint"),
        (["--from_pretrained", ""], "--from_pretrained is empty: type a file of weights, or timm"),
        (["--checkpoint_async", "maybe"], "--checkpoint_async is 'maybe': type true or false or null"),
        (["--on_nan", "go"], "--on_nan is 'go': type one of stop, skip"),
        (["--strategy", "dpp"], "--strategy is 'dpp': type one of resist, local_sgd, stochastic_depth, ddp"),
        (
            ["--strategy", "ddp", "--min_blocks", "2"],
            "--min_blocks is for --strategy resist: with ddp all hold",
        ),
        (["--strategy", "local_sgd", "--warmup_rounds", "1"], "--warmup_rounds is for --strategy resist"),
        (
            ["--strategy", "ddp", "--optimizer_state", "reset"],
            "--optimizer_state reset is not for --strategy ddp",
        ),
        (["--strategy", "ddp", "--on_nan", "skip"], "--on_nan skip is not for --strategy ddp"),
    ],
)
def test_mistakes_that_only_combinations_show(typed, line):
    assert error(*typed).startswith(line)


def test_overridden_options_and_bare_switches():
    config = parse(["--override", "lr, batch-size,", "--checkpoint_async", "--resume", "auto"])
    assert config.overridden == ("lr", "batch_size")
    assert config.checkpoint_async is True
    assert (
        parse([]).checkpoint_async is None and parse(["--checkpoint_async", "null"]).checkpoint_async is None
    )


def test_what_shapes_training_is_all_but_place_time_and_words():
    free = {f.name for f in dataclasses.fields(Config)} - set(SHAPING)
    assert {"workers", "output_dir", "data_dir", "eval_every", "keep", "cpu_threads", "on_nan"} <= free
    assert {"lr", "model", "seed", "batch_size", "epochs", "rounds", "mixed_precision", "dtype"} <= set(
        SHAPING
    )
