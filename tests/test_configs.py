"""configs: one file of plain assignments, then --key=value, checked alike."""
import ast
import dataclasses
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import configs
import data
import evaluate
import finetune
import pretrain
from lab import figures, probe, study

HERE = Path(configs.__file__).parent


@dataclasses.dataclass
class Config:
    name: str = "run"
    steps: int = 100
    lr: float = 1e-3
    flag: bool = True
    quiet: bool = False
    window: tuple = (-175.0, 250.0)
    slab: tuple = (96, 96, 96)
    spacing: tuple = ()
    scans: str | tuple = ()
    labels: dict = dataclasses.field(default_factory=dict)


def ends(*argv, **options):
    with pytest.raises(SystemExit) as caught:
        configs.load(Config, list(argv), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "x.py").write_text(text)
        return str(tmp_path / "x.py")
    return write


def test_defaults_then_files_then_command_line_whatever_their_order(file, tmp_path):
    path = file('"""What it is."""\nimport math\ndef f(): pass\nclass C: pass\n_hidden = 3\n'
                'steps = 5\nlr = 2e-4\nscans = ["a/*", "b/*"]\n')
    assert configs.load(Config, []) == Config()
    assert configs.load(Config, [path]) == Config(steps=5, lr=2e-4, scans=("a/*", "b/*"))
    for argv in ([path, "--steps=7"], ["--steps=7", path]):
        assert configs.load(Config, argv) == Config(steps=7, lr=2e-4, scans=("a/*", "b/*"))
    (tmp_path / "later.py").write_text("steps = 6\nlr = 1\n")       # goes over the earlier file
    both = configs.load(Config, [path, str(tmp_path / "later.py")])
    assert both == Config(steps=6, lr=1.0, scans=("a/*", "b/*"))


VALUES = [
    ("--name=2024", "name", "2024"), ("--name=a=b=c", "name", "a=b=c"), ("--name='quoted'", "name", "quoted"),
    ("--name=runs/x", "name", "runs/x"), ("--name=None", "name", "None"), ("--name=", "name", ""),
    ("--steps=100_000", "steps", 100000), ("--lr=1", "lr", 1.0), ("--lr=1e-5", "lr", 1e-5),
    ("--flag=False", "flag", False), ("--quiet=True", "quiet", True), ("--quiet", "quiet", True),
    ("--window=[0,1]", "window", (0.0, 1.0)), ("--window=-5,2.5", "window", (-5.0, 2.5)),
    ("--slab=(64, 64, 32)", "slab", (64, 64, 32)), ("--spacing=(1,1.5,2)", "spacing", (1, 1.5, 2)),
    ("--spacing=()", "spacing", ()), ("--scans=a/*.nii.gz", "scans", "a/*.nii.gz"),
    ("--scans=a=1/*", "scans", "a=1/*"), ("--scans=('a', 'b')", "scans", ("a", "b")),
    ("--labels={1: 'liver'}", "labels", {1: "liver"})]


@pytest.mark.parametrize("text, key, value", VALUES)
def test_command_line_values(text, key, value):
    found = getattr(configs.load(Config, [text]), key)
    assert found == value and type(found) is type(value)
    if type(value) is tuple:
        assert list(map(type, found)) == list(map(type, value))


WRONG = [
    ("flag", "'false'", "flag = 'false' is str, expected bool like True"),
    ("flag", "0", "flag = 0 is int, expected bool"),
    ("steps", "1.5", "steps = 1.5 is float, expected int like 100"),
    ("steps", "True", "steps = True is bool, expected int"),
    ("lr", "True", "lr = True is bool, expected float"),
    ("lr", "'fast'", "lr = 'fast' is str, expected float like 0.001"),
    ("window", "(1.0,)", "window = (1.0,), expected 2 numbers like (-175.0, 250.0)"),
    ("window", "(0.0, 'a')", "expected 2 numbers"), ("window", "(True, 1.0)", "expected 2 numbers"),
    ("slab", "(96, 96)", "slab = (96, 96), expected 3 numbers"),
    ("slab", "96", "slab = 96 is int, expected tuple"),
    ("slab", "(96, 96, 9.5)", "expected whole numbers like (96, 96, 96)"),
    ("scans", "7", "scans = 7 is int, expected str or tuple"),
    ("scans", "('a', 7)", "scans = ('a', 7), expected texts like ('a', '7')"),
    ("spacing", "('1', '1', '1')", "spacing = ('1', '1', '1'), expected numbers"),
    ("labels", "[1]", "labels = (1,) is tuple, expected dict like {1: 'name'}"),
    ("stepz", "3", "unknown config key 'stepz'; did you mean 'steps'?"),
    ("zzz", "3", "unknown config key 'zzz'; known: name, steps,")]


@pytest.mark.parametrize("key, text, words", WRONG)
def test_mistakes_are_as_loud_in_a_file_as_on_the_command_line(file, key, text, words):
    path = file(f"{key} = {text}\n")
    assert words in ends(path) and ends(path).startswith(path)
    assert words in ends(f"--{key}={text}") and ends(f"--{key}={text}").startswith("command line")


def test_words_that_look_like_values_are_refused(file):
    assert "name = 2024 is int, expected str" in ends(file("name = 2024"))
    assert "flag = 'false' is str" in ends("--flag=false")
    assert "flag = 'no' is str" in ends("--flag=no")
    assert ends("--steps") == "--steps: write overrides as --steps=VALUE"
    assert ends("--steps", "5") == "--steps: write overrides as --steps=5"
    assert ends("--name", "runs/a/encoder.pt") == "--name: write overrides as --name=runs/a/encoder.pt"
    assert ends("--flag", "nowhere/zzzz.py") == "nowhere/zzzz.py: no such config file; there are: none"
    assert ends("--epochs=5").endswith("'steps'?")
    assert "unknown config key 'fast'" in ends("--fast=1")


def test_files_that_are_not_there_or_too_many(file, tmp_path):
    path = file("steps = 5")
    other = tmp_path / "my_liver.py"
    other.touch()
    near, far = str(tmp_path / "my_livers.py"), str(tmp_path / "zzzz.py")
    assert ends(near) == f"{near}: no such config file; did you mean {other}?"
    assert ends(far) == f"{far}: no such config file; there are: {other}, {path}"
    assert ends("btvc") == f"btvc: no such config file; did you mean {os.path.relpath(HERE / 'btcv.py')}?"
    assert ends("nowhere/zzzz.py") == "nowhere/zzzz.py: no such config file; there are: none"


def test_keys_of_other_scripts_are_named_and_left_alone_but_only_in_a_file(file, capsys):
    path = file("steps = 5\nmomentum = 0.9\ntask = 'x'\nprobe_share = 0.2\n")
    assert configs.load(Config, [path]) == Config(steps=5)
    assert capsys.readouterr().out == "keys left to other scripts: momentum, task, probe_share\n"
    assert "command line: unknown config key 'momentum'" in ends(path, "--momentum=0.9")
    assert "unknown config key 'momentun'" in ends(file("momentun = 0.9"))      # a misspelt key is nobody's
    assert "steps = 'x' is str" in ends(file("steps = 'x'\ntask = 'x'"))


@pytest.mark.parametrize("fails", [False, True])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, fails):
    path = tmp_path / "x.txt"
    path.write_text("old")
    try:
        with configs.replacing(path) as aside:
            aside.write_text("new")
            assert path.read_text() == "old" and aside.parent == tmp_path
            assert list(tmp_path.glob("*.txt")) == [path]
            if fails:
                raise OSError("disk full")
    except OSError:
        assert fails
    assert path.read_text() == ("old" if fails else "new") and list(tmp_path.iterdir()) == [path]


def test_a_dumped_configuration_is_a_configuration(file):
    cfg = Config(name="it's \"x\"\\n", steps=7, lr=1e-300, flag=False, window=(0.1, 1 / 3),
                 spacing=(1, 1.5), scans=("a", "b c"), labels={1: "a", 2: "b"})
    text = configs.dump(cfg)
    assert configs.load(Config, [file(text)]) == cfg
    keys = [line.split(" = ")[0] for line in text.splitlines()]
    assert keys == [f.name for f in dataclasses.fields(Config)]
    assert ast.literal_eval(text.splitlines()[2].split(" = ")[1]) == 1e-300
    full = data.Config(labels={1: "liver"}, remap={4: 3}, scans=("a",))
    assert configs.load(data.Config, [file(configs.dump(full))]) == full


@pytest.mark.parametrize("path", sorted(HERE.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_shipped_config_is_read_as_it_stands_and_can_be_stored(path, file, capsys):
    keys = {key: value for key, value in runpy.run_path(str(path)).items() if key[0] != "_"}
    if "rows" in keys:
        scripts = [study.Config]
    elif "task" in keys:
        scripts = [finetune.Config, evaluate.Config, data.Config]
    else:
        scripts = [probe.Config if path.stem.endswith("_probe") else pretrain.Config, data.Config]
    for n, script in enumerate(scripts):
        cfg = configs.load(script, [str(path)])                     # an unknown key ends it
        mine = [key for key in keys if hasattr(cfg, key)]
        assert all(getattr(cfg, key) == keys[key] for key in mine)
        assert configs.load(script, [file(configs.dump(cfg))]) == cfg
        if len(scripts) < 3:
            assert n or mine == list(keys)      # a pre-training config is for pretrain.py alone
    if len(scripts) == 3:       # each key is one of training or of scoring
        assert all(any(hasattr(script(), key) for script in scripts) for key in keys)


def test_a_key_stands_in_one_config():
    """Of one line of inheritance no class declares a key again: its default would depend on who asks."""
    for script in (pretrain, finetune, evaluate, probe, figures):
        declared = [set(c.__annotations__) for c in script.Config.__mro__ if "__annotations__" in vars(c)]
        assert sum(map(len, declared)) == len(set().union(*declared))


def test_sweep_takes_what_the_dead_and_the_long_gone_left(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {f".a.npy.{configs.here()}-{dead.pid}.tmp": False, f".a.npy.{configs.here()}-{os.getpid()}.tmp": True,
             ".a.npy.elsewhere-0000-1.tmp": True, ".b.npy.elsewhere-0000-1.tmp": False, "a.npy": True}
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / ".b.npy.elsewhere-0000-1.tmp", (0, 0))
    configs.sweep(tmp_path)
    assert {name: (tmp_path / name).exists() for name in names} == names


FACTS = {   # of the public lists and recipes, written out once more
    "btcv": dict(val=tuple(f"{n:04d}" for n in range(35, 41)), window=(-175.0, 250.0), spacing=(1.5, 1.5, 1.5), overlap=0.75),
    "msd_liver": dict(val=tuple("126 100 49 57 92 85 123 74 2 99 103 81 48 65 116 67 16 14 51 17 70 101 3".split()),
                      window=(-175.0, 250.0), foreground=-175.0, spacing=(1.5, 1.5, 1.5)),
    "msd_lung": dict(val=tuple("006 010 033 034 041 042 046 048 059 065 066 070 079".split()), window=(-1000.0, 500.0),
                     spacing=(1.25, 1.25, 5.0)),
    "msd_spleen": dict(val=tuple("10 13 14 17 31 33 44 47 56".split()), window=(-175.0, 250.0), foreground=-175.0,
                       spacing=(1.5, 1.5, 1.5)),
    "brats21": dict(labels={1: "NCR", 2: "ED", 3: "ET"}, remap={4: 3}, foreground=0.0,
                    regions={"TC": (1, 3), "WT": (1, 2, 3), "ET": (3,)}),
}


@pytest.mark.parametrize("name", FACTS)
def test_splits_and_recipes_are_the_public_ones(name):
    found = configs.read(str(HERE / f"{name}.py"))
    for key, value in FACTS[name].items():
        if key == "labels":
            assert set(found[key]) == set(value)
        elif key == "val":
            assert sorted(found[key]) == sorted(value)
        else:
            assert found[key] == value, key


def test_the_1k_encoder_never_saw_whom_btcv_scores(tmp_path):
    for k in range(30, 41):
        path = tmp_path / f"BTCV/Abdomen/RawData/Training/img/img{k:04d}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    cfg = configs.load(data.Config, [str(HERE / "ct_1k.py")])
    cfg = dataclasses.replace(cfg, data=str(tmp_path), scans=cfg.scans[0])
    assert [case["id"][-4:] for case in data.find_cases(cfg)] == [f"{k:04d}" for k in range(30, 35)]


@pytest.mark.parametrize("name, file, subject", [
    ("mri", "OASIS3/OAS30001_MR_d0129/anat2/sub-OAS30001_ses-d0129_run-01_T1w.nii.gz", "OAS30001"),
    ("pet", "UDPET/Subject_1-6/0123/Full_dose/1.dcm", "0123"), ("pet", "UDPET/u/0124/2.886 x 600 WB normal/1.dcm", "0124"),
    ("pet", "ADNI/002_S_0295/Av/2006-11/I123/ADNI_002.nii", "002_S_0295"),
    ("sarcoma_pretrain_all", "sarcoma/t1/imagesTr/002.nii.gz", "002")])
def test_scans_of_one_person_are_of_one_subject(tmp_path, name, file, subject):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    cfg, found = configs.load(data.Config, [str(HERE / f"{name}.py")]), []
    for pattern in cfg.scans:
        try:
            found += data.find_cases(dataclasses.replace(cfg, data=str(tmp_path), scans=pattern, exclude=()))
        except SystemExit:
            pass
    assert [case["subject"] for case in found] == [subject]


def test_sarcoma_pairs_are_scored_on_test_patients_alone():
    cfg, whole = (configs.load(finetune.Config, [str(HERE / f"{name}.py")]) for name in ("sarcoma_t1_ct", "sarcoma_ct"))
    assert set(cfg.test) < set(whole.test) and not {*cfg.val} & {*whole.test, *whole.val}
