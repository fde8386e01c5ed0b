"""The built wheel holds the config files, and the command works from it in any directory."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_command_works_from_an_installed_wheel_in_any_directory(tmp_path: Path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*build, str(TOP)], check=True)
    (wheel,) = tmp_path.glob("qlora_dist-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "qlora_dist/conf/config.yaml" in names
    assert "qlora_dist/py.typed" in names
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "-q", str(wheel)], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (own,) = [path for path in sys.path if path.endswith("site-packages")]
    others = site / "others.pth"
    others.write_text(own + "\n")
    done = subprocess.run(
        [python, "-m", "qlora_dist.launch", "+experiment=legal", "plan_only=true"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "adapter/legal-1" in done.stdout
    where = [python, "-c", "import qlora_dist; print(qlora_dist.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(tmp_path))
