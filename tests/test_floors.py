"The house: a notebook imports only from notebooks with a lower number, and a stem is its module's name"
import json, re
from pathlib import Path
import pytest

NBS = Path(__file__).parents[1]/'nbs'
NUMBER = {p.stem[3:]: int(p.stem[:2]) for p in NBS.glob('[0-9]*.ipynb')}

def exported(path):
    cells = json.loads(path.read_text())['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    return [s for s in sources if s.startswith('#| export')]

def upward(number, sources):
    "Modules imported by exported cells that do not stand below `number`"
    names = {m for s in sources for m in re.findall(r'(?:from|import) ftkit\.(\w+)', s)}
    return {m for m in names if NUMBER[m] >= number}

@pytest.mark.parametrize('path', sorted(NBS.glob('[0-9]*.ipynb')), ids=lambda p: p.stem)
def test_imports_point_down(path):
    assert upward(int(path.stem[:2]), exported(path)) == set()
    assert f'#| default_exp {path.stem[3:]}"' in path.read_text()

def test_an_upward_import_is_seen():
    assert upward(12, ['#| export\nfrom ftkit.train import train']) == {'train'}
    assert upward(12, ['#| export\nfrom ftkit.chat import render']) == set()

def test_notebooks_are_small():
    for path in NBS.rglob('*.ipynb'):
        if '.ipynb_checkpoints' in path.parts or 'runs' in path.parts: continue
        cells = json.loads(path.read_text())['cells']
        assert path.stat().st_size <= 300_000, path
        if path.stem == '01_first_fine_tune': assert len(cells) <= 40
