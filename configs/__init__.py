"""The whole configuration mechanism: defaults in a script, then files of plain assignments, then --key=value.

    cfg = load(Config, sys.argv[1:])    # Config: the script's dataclass, its comments explain every key
    print(dump(cfg))                    # plain assignments again: a stored run configuration is a config file

Keys and types are checked alike wherever a value comes from, so a typo in a file is as loud as one on the
command line. And, because every room writes files: `replacing`.
"""
import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import os
import pathlib
import re
import runpy
import time
import traceback
import types


def load(Config, argv):
    """Config instance from `argv` = file.py .. --key=value ..; later files win. One line on any mistake.

    A file may hold keys of another script as well (a task's config serves finetune.py and evaluate.py): they
    are named in a printed line and left alone. A key on the command line must be one of this script's. The
    environment variable S2DC_DATA goes before a file's `data`, not before the command line's. --help shows
    the keys.
    """
    fields = {f.name: f for f in dataclasses.fields(Config)}
    given, elsewhere = {}, []
    if "--help" in argv or "-h" in argv:
        print(explained(Config))
        raise SystemExit
    for arg, after in zip(argv, [*argv[1:], "--"]):                 # before a value is taken for a file
        switch = arg[2:] in fields and fields[arg[2:]].type is bool
        if arg.startswith("--") and "=" not in arg and not switch:
            raise SystemExit(f"{arg}: write overrides as {arg}={'VALUE' if after[:2] == '--' else after}")
    for file in [arg for arg in argv if not arg.startswith("--")]:
        for key, value in read(file).items():
            if key not in fields and key in declared():
                elsewhere.append(key)
            else:
                given[key] = checked(fields, key, value, file)
    if "data" in fields and os.environ.get("S2DC_DATA"):
        given["data"] = os.environ["S2DC_DATA"]
    for arg in [arg for arg in argv if arg.startswith("--")]:
        key, equals, text = arg[2:].partition("=")                  # the value may itself contain '='
        text = text if equals else "True"                           # a bare --compile switches it on
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text                                            # a bare word or a path stays a string
        if key in fields and fields[key].type is str and not isinstance(value, str):
            value = text                                            # --name=2024 names a run, it is no number
        given[key] = checked(fields, key, value, "command line")
    if elsewhere:
        print("keys left to other scripts: " + ", ".join(elsewhere))
    return Config(**given)


def read(file):
    """{key: value} of a file of plain assignments; one line that names the file where it cannot be run."""
    if not pathlib.Path(file).is_file():
        there = sorted(map(str, pathlib.Path(file).parent.glob("[!_]*.py")))
        ours = {path.stem: os.path.relpath(path) for path in pathlib.Path(__file__).parent.glob("[!_]*.py")}
        named = ours | {pathlib.Path(path).stem: path for path in there}
        near = difflib.get_close_matches(pathlib.Path(file).stem, named, 1, 0.7)
        hint = f"did you mean {named[near[0]]}?" if near else "there are: " + (", ".join(there) or "none")
        raise SystemExit(f"{file}: no such config file; {hint}")
    try:
        found = runpy.run_path(file)
    except Exception as error:                                      # whatever it is, the file is at fault
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise SystemExit(f"{file}: {said}" + (f" (line {lines[-1]})" if lines else "")) from None
    kinds = types.ModuleType, types.FunctionType, type
    return {key: value for key, value in found.items() if key[0] != "_" and not isinstance(value, kinds)}


@functools.cache
def declared():
    """The keys of every script's Config, read off the sources: no script imports another for them."""
    root = pathlib.Path(__file__).resolve().parents[1]
    trees = [ast.parse(path.read_text()) for path in [*root.glob("*.py"), *root.glob("lab/**/*.py")]]
    bodies = [node.body for tree in trees for node in tree.body if getattr(node, "name", "") == "Config"]
    return {line.target.id for body in bodies for line in body if isinstance(line, ast.AnnAssign)}


def dump(cfg):
    """Plain assignments, one key a line, that `load` reads back to an equal configuration."""
    return "\n".join(f"{f.name} = {getattr(cfg, f.name)!r}" for f in dataclasses.fields(cfg))


def differing(cfg):
    """As `dump`, of the keys that are not as the defaults; the whole stands in runs/<name>/config.py."""
    default = type(cfg)()
    keys = [f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != getattr(default, f.name)]
    return "\n".join(f"{key} = {getattr(cfg, key)!r}" for key in keys)


def explained(Config):
    """The keys of a script with defaults and comments, in their groups, as the sources have them."""
    text = []
    for part in [part for part in reversed(Config.__mro__) if part is not object]:
        lines = inspect.getsource(part).splitlines()
        text.append(f"\n# {part.__module__.removeprefix('__main__') or 'this script'}")
        for line in lines:
            assignment = re.match(r"    (\w+): .*?( = .*)", line)
            if assignment:
                value = re.sub(r"dataclasses.field\(default_factory=dict\)", "{}", assignment[2])
                text.append(f"--{assignment[1]}{value}")
            elif line.startswith("    #"):
                text.append(line.strip())
    return "\n".join(text).strip()


def checked(fields, key, value, where):
    """The value of a key as its default has it (a list as a tuple, 1 as 1.0), or a line on what is due."""
    if key not in fields:
        near = difflib.get_close_matches(key, fields, 3) + ["steps"] * (key == "epochs")
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(fields)}"
        raise SystemExit(f"{where}: unknown config key {key!r}; {hint}")
    want, default = fields[key].type, fields[key].default
    if default is dataclasses.MISSING:
        default = fields[key].default_factory()
    kinds = want.__args__ if isinstance(want, types.UnionType) else (want,)
    if isinstance(value, list):
        value = tuple(value)
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) not in kinds:                                # type(), not isinstance: True is no int here
        kind, names = type(value).__name__, " or ".join(k.__name__ for k in kinds)
        like = default or {tuple: (1, 1, 1), dict: {1: "name"}}.get(kinds[-1], default)
        raise SystemExit(f"{where}: {key} = {value!r} is {kind}, expected {names} like {like!r}")
    if type(value) is tuple and str in kinds and not all(type(v) is str for v in value):
        raise SystemExit(f"{where}: {key} = {value!r}, expected texts like {tuple(map(str, value))}")
    if type(value) is tuple and default == () and str not in kinds and not numbers(value):
        raise SystemExit(f"{where}: {key} = {value!r}, expected numbers")
    if type(value) is tuple and type(default) is tuple and default and numbers(default):
        if len(value) != len(default) or not numbers(value):
            raise SystemExit(f"{where}: {key} = {value!r}, expected {len(default)} numbers like {default!r}")
        if any(type(v) is float for v in default):
            value = tuple(float(v) for v in value)
        elif any(type(v) is float for v in value):
            raise SystemExit(f"{where}: {key} = {value!r}, expected whole numbers like {default!r}")
    return value


def numbers(values):
    """Whether all are numbers; True is none."""
    return all(type(v) in (int, float) for v in values)


@functools.cache
def here():
    """A name for where process numbers hold: this machine since it was started, of two with one host name,
    say on a shared disk, too, and of its containers this one."""
    boot, numbers = pathlib.Path("/proc/sys/kernel/random/boot_id"), pathlib.Path("/proc/self/ns/pid")
    numbers = re.sub(r"\D", "", os.readlink(numbers)) if os.path.lexists(numbers) else ""
    return f"{os.uname().nodename}-{boot.read_text()[:8] if boot.exists() else ''}-{numbers}"


def sweep(folder):
    """Remove what killed writers left in a folder: processes of here that are gone, or of an hour ago."""
    for left in pathlib.Path(folder).glob(".*.tmp"):
        name, _, pid = left.name.removesuffix(".tmp").rpartition("-")
        gone = name.endswith(here()) and not os.path.exists(f"/proc/{pid}") and os.path.exists("/proc")
        with contextlib.suppress(OSError):      # gone meanwhile, or somebody else's
            if gone or time.time() - left.stat().st_mtime > 3600:
                left.unlink()


@contextlib.contextmanager
def replacing(path):
    """A file beside `path`, written first: it takes the name when the block ends, and is gone if that fails.

    So a reader, or a run that is killed, finds the old file or the whole new one.
    """
    path = pathlib.Path(path)                                   # no pattern for data finds the name beside it
    aside = path.with_name(f".{path.name}.{here()}-{os.getpid()}.tmp")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())     # the name must not reach the disk before the content
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
