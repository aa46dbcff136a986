"""What holds for the project as a whole: layers, packaging, and that what it shows to a reader runs."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_kernels_know_nothing_of_transformers_or_of_the_engine():
    for file in (ROOT / "kernels").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (transformers|renyi_engine|peft|datasets)", file.read_text(), re.M), (
            file
        )


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_nothing_is_ever_unpickled():
    for folder in ("kernels", "renyi_engine", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not re.search(
                r"torch\.load|import pickle|pickle\.load|eval\(\)?[^a-z_]*input|exec\(", file.read_text()
            ), file


def test_the_wheel_holds_the_two_packages_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"renyi_engine", "renyi_kernels"}
    shipped = {name for name in names if ".dist-info" not in name}
    for package, folder in (("renyi_engine", "renyi_engine"), ("renyi_kernels", "kernels/renyi_kernels")):
        on_disk = {
            p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"
        }
        assert {f"{package}/{path}" for path in on_disk} == {name for name in shipped if name.startswith(f"{package}/")}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_editable_installation_leaks_no_folder_of_the_project():
    names = ("tests", "examples", "csrc_bench", "kernels")
    program = f"import importlib.util; print([n for n in {names} if importlib.util.find_spec(n)])"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_the_custom_loop_is_short_trains_and_needs_nothing_of_the_trainer(model_folder, tmp_path, monkeypatch, capsys):
    path = ROOT / "examples" / "custom_loop.py"
    source = path.read_text()
    assert len(source.splitlines()) < 60
    assert not re.search(r"import .*(trainer|SftConfig|\btrain\b)", source)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path))["main"](str(model_folder), num_steps=6)
    losses = [float(match) for match in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0]
    assert (tmp_path / "runs" / "custom_loop" / "ensemble.json").exists()
