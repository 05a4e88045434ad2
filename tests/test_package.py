"What pip installs: a wheel of at most 9 MB that works away from the repository"
import subprocess, sys, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', out, ROOT], check=True, capture_output=True)
    return next(out.glob('*.whl'))

def test_size_and_content(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size <= 9e6
    assert {'ftkit/assets/base/model.safetensors', 'ftkit/assets/base/tokenizer.json', 'ftkit/assets/settings.ini'} <= {*names}
    assert not [n for n in names if n.startswith(('nbs', 'tests', 'examples')) or n.endswith(('.bin', '.pt', '.pkl'))]
    assert sum(p.stat().st_size for p in (ROOT/'ftkit'/'assets').rglob('*') if p.is_file()) <= 8e6

def test_installed_elsewhere(wheel, tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', tmp_path/'site', wheel], check=True, capture_output=True)
    code = '''import ftkit, ftkit.tiny, ftkit.core
from transformers import AutoModelForCausalLM
assert ftkit.__file__.startswith({site!r}), ftkit.__file__
model = AutoModelForCausalLM.from_pretrained(ftkit.tiny.base())
print(sum(p.numel() for p in model.parameters()), ftkit.core.profile().model)
'''.format(site=str(tmp_path/'site'))
    # -P and a path in front: not the checkout, which is installed in editable mode here
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env={'PYTHONPATH': str(tmp_path/'site'), 'PATH': '/usr/bin:/bin', 'HF_HUB_OFFLINE': '1'}, capture_output=True, text=True)
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
