"""What `pip install krl` gives: the wheel, installed beside nothing of a checkout, trains and measures."""

import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from typing import NamedTuple

import pytest

from krl import __version__
from tests.command_line import ROOT, TINY, rows

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


class Installed(NamedTuple):
    wheel: pathlib.Path
    bin: pathlib.Path  # the commands of the environment that has it
    home: pathlib.Path  # of a user, who has nothing else


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of these files, in an environment of its own, with what it depends on."""
    place = tmp_path_factory.mktemp("package")
    (place / "home").mkdir()
    shutil.copytree(ROOT / "krl", place / "source" / "krl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "source")
    call([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", place, place / "source"])
    (wheel,) = place.glob("*.whl")
    venv.create(place / "venv", with_pip=True)
    call([place / "venv" / "bin" / "python", "-m", "pip", "install", "--no-compile", wheel])
    return Installed(wheel, place / "venv" / "bin", place / "home")


def call(command, **changes):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JAX_", "XLA_"))}
    done = subprocess.run(
        [str(part) for part in command], env=clean | changes, cwd=changes.get("HOME"), capture_output=True, text=True, timeout=900
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_uses_the_python_that_is_asked_for_or_none(tmp_path):
    for path, version in (("venv/bin/python", "3.11.7"), ("same", "3.11.7"), ("newer", "3.13.0")):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\necho Python {version}\n")
        file.chmod(0o755)

    def make(*asked):
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV", "MAKEFLAGS")}
        command = ["make", "-f", ROOT / "Makefile", "same-python", "VENV=venv", *asked]
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        return done.returncode, done.stderr.splitlines()[:1]

    assert make() == make("PYTHON=./same") == (0, [])
    advice = "give VENV=.venv-other too, or remove venv"
    assert make("PYTHON=./newer") == (2, [f"venv has Python 3.11.7, and PYTHON=./newer is Python 3.13.0: {advice}"])
    assert make("PYTHON=./gone") == (2, [f"venv has Python 3.11.7, and PYTHON=./gone is no Python that runs: {advice}"])


def test_the_oldest_versions_are_read_from_the_requirements():
    said = subprocess.run(["make", "--dry-run", "oldest"], cwd=ROOT, capture_output=True, text=True).stdout
    (asked,) = re.findall(r"REQUIREMENTS=\"\$\((.*)\)\"", said)
    oldest = subprocess.run(["sh", "-c", asked], cwd=ROOT, capture_output=True, text=True).stdout.split()
    bounds = re.findall(r"^(\S+)>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert len(bounds) == len((ROOT / "requirements.txt").read_text().splitlines())
    assert oldest == [f"{name}=={version}" for name, version in bounds]


def test_the_packages_are_those_on_the_disk():
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "krl").rglob("*.py")}
    assert sorted(SETTINGS["tool"]["setuptools"]["packages"]) == sorted(".".join(folder.parts) for folder in folders)


@pytest.mark.slow
def test_the_wheel_has_all_files_and_nothing_beside_krl(installed):
    kept = [file.relative_to(ROOT) for file in (ROOT / "krl").rglob("*") if file.is_file() and file.suffix != ".pyc"]
    with zipfile.ZipFile(installed.wheel) as wheel:
        held = [name for name in wheel.namelist() if ".dist-info/" not in name]
        (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        about = email.message_from_string(wheel.read(metadata).decode())
    assert sorted(held) == sorted(file.as_posix() for file in kept)
    assert {"krl/py.typed", "krl/configs/arithmetic.py"} <= set(held)
    assert about["Version"] == __version__
    assert about.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    site = "import krl, pathlib; print(pathlib.Path(krl.__file__).parent.parent); print(krl.__version__)"
    folder, version = call([installed.bin / "python", "-c", site], HOME=str(installed.home)).split()
    assert pathlib.Path(folder).is_relative_to(installed.bin.parent)
    assert version == __version__
    (record,) = pathlib.Path(folder).glob("krl-*.dist-info/RECORD")
    tops = {line.split(",")[0].split("/")[0] for line in record.read_text().splitlines()}
    assert tops == {"krl", record.parent.name, ".."}  # the last has the commands
    assert "No broken requirements" in call([installed.bin / "python", "-m", "pip", "check"])


@pytest.mark.slow
def test_an_installed_krl_trains_and_measures(installed):
    keys = [f"--config.{key}={value}" for key, value in (TINY | {"steps": 3, "sft.steps": 20}).items()]
    user = {"HOME": str(installed.home), "JAX_PLATFORMS": "cpu"}
    for name in ("arithmetic", "configs/arithmetic.py"):
        said = call([installed.bin / "krl-train", "--config", name, "--workdir", "runs/first", *keys], **user)
    assert "krl: continuing from step 3" in said
    run = installed.home / "runs" / "first"
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3]
    assert "held_out" in call(
        [installed.bin / "krl-eval", "--config=arithmetic", "--workdir=runs/first", *keys], **user
    )
    assert (run / "results.json").exists()
