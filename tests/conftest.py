"Fixtures: shared data where it is present, tiny chat models, a place to run the command line"
import subprocess, sys
from pathlib import Path
import pytest

SHARED = Path(__file__).resolve().parents[2]/'shared'/'data'

@pytest.fixture(scope='session')
def shared():
    "The folder of shared data sets and models; a user's machine has none"
    if not SHARED.is_dir(): pytest.skip(f'no shared data at {SHARED}')
    return SHARED

@pytest.fixture
def ftkit(capfd, monkeypatch, tmp_path):
    "Run a command of ftkit in this process, in an empty folder: (exit code, stdout, stderr)"
    from ftkit.cli import main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('IN_TEST', '1')
    def run(*args):
        code = main([str(a) for a in args])
        return (code, *capfd.readouterr())
    return run

@pytest.fixture
def spawn(tmp_path):
    "Start a command of ftkit as a process of its own, in an empty folder"
    def start(*args):
        command = [Path(sys.executable).with_name('ftkit'), *map(str, args)]
        return subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return start
