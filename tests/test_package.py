"What pip installs: a wheel of at most 9 MB that works away from the repository"
import os, subprocess, sys, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]

def pip(*args): subprocess.run([sys.executable, '-m', 'pip', *args], check=True, capture_output=True)

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp('dist')
    pip('wheel', '-q', '--no-deps', '--no-build-isolation', '-w', out, ROOT)
    return next(out.glob('*.whl'))

def test_size_and_content(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size <= 9e6
    assert {f'ftkit/assets/{p}' for p in ('base/model.safetensors', 'base/tokenizer.json', 'settings.ini')} <= {*names}
    assert not [n for n in names if n.startswith(('nbs', 'tests', 'examples')) or n.endswith(('.bin', '.pt', '.pkl'))]
    assert sum(p.stat().st_size for p in (ROOT/'ftkit'/'assets').rglob('*') if p.is_file()) <= 8e6

def test_installed_elsewhere(wheel, tmp_path):
    pip('install', '-q', '--no-deps', '--target', tmp_path/'site', wheel)
    code = '''import ftkit, ftkit.tiny, ftkit.core
from transformers import AutoModelForCausalLM
assert ftkit.__file__.startswith({site!r}), ftkit.__file__
model = AutoModelForCausalLM.from_pretrained(ftkit.tiny.base())
print(sum(p.numel() for p in model.parameters()), ftkit.core.profile().model)
'''.format(site=str(tmp_path/'site'))
    # its path stands in front of the checkout's, which is installed in editable mode here
    env = {**os.environ, 'PYTHONPATH': str(tmp_path/'site')}
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ['1410688', 'embedded']

def test_packaged_settings_are_those_of_the_root():
    assert (ROOT/'settings.ini').read_bytes() == (ROOT/'ftkit'/'assets'/'settings.ini').read_bytes()

def test_imports_of_the_tutorials_are_in_the_package(wheel):
    import json, re
    names = {n for n in zipfile.ZipFile(wheel).namelist()}
    for path in (ROOT/'nbs'/'tutorials').glob('*.ipynb'):
        source = '\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'])
        assert {f'ftkit/{m}.py' for m in re.findall(r'from ftkit\.(\w+) import', source)} <= names
