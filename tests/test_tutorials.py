"What every tutorial must have, and what the home page says of it"
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from ftkit.tiny import base

NBS = Path(__file__).parents[1]/'nbs'
TUTORIALS = sorted((NBS/'tutorials').glob('*.ipynb'))

def faults(cells):
    "What a tutorial lacks"
    text = lambda c: ''.join(c['source'])
    prose,code = ([text(c) for c in cells if c['cell_type'] == kind] for kind in ('markdown', 'code'))
    seen = len(cells) - sum(text(c).startswith('#| hide') for c in cells)
    answers = next((i for i,c in enumerate(cells) if '<details><summary>Answers' in text(c)), None)
    solved = [] if answers is None else [text(c) for c in cells[answers:] if text(c).startswith('#| hide')]
    return [name for name,ok in {
        'a title and a promise': re.match(r'# .+\n\n> .+', prose[0]),
        'between 25 and 60 cells to read': 25 <= seen <= 60,
        'about half of it prose': len(prose) >= .4*seen,
        'a Colab button': any('colab-badge.svg' in p for p in prose[:4]),
        'an install cell, for Colab only': any("'COLAB_RELEASE_TAG' in os.environ" in c for c in code[:3]),
        'a widget': any(re.search(r'from ftkit\.(widgets|live) import', c) for c in code),
        'what goes wrong': any(re.search('wrong', p) for p in prose),
        'exercises with folded answers': any('xercises' in p for p in prose) and answers is not None,
        'answers that are asserted': any(re.search(r'^\s*(assert|test_\w+\()', c, re.M) for c in solved),
        'no output on stderr': not any(o.get('name') == 'stderr' for c in cells for o in c.get('outputs', [])),
        'nothing that is not run': not any('eval: false' in c for c in code)}.items() if not ok]

@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_it_teaches(path):
    nb = json.loads(path.read_text())
    assert faults(nb['cells']) == [] and 'widgets' not in nb['metadata']

def test_a_tutorial_without_answers_is_seen():
    cells = json.loads(TUTORIALS[0].read_text())['cells']
    assert faults(cells[:-1]) == ['answers that are asserted']
    anywhere = [c for c in cells if 'COLAB_RELEASE' not in ''.join(c['source'])]
    assert 'an install cell, for Colab only' in faults(anywhere)

def test_the_home_page_lists_all_of_them():
    home = ''.join(''.join(c['source']) for c in json.loads((NBS/'index.ipynb').read_text())['cells'])
    row = r'\| (\d+) \| \[(.+?)\]\(tutorials/(\w+)\.ipynb\): .+? \| .+/nbs/tutorials/(\w+)\.ipynb\) \|'
    listed = re.findall(row, home)
    title = lambda p: re.search('^# (.+)', json.loads(p.read_text())['cells'][0]['source'][0])[1]
    assert listed == [(str(int(p.stem[:2])), title(p), p.stem, p.stem) for p in TUTORIALS]
    assert [int(p.stem[:2]) for p in TUTORIALS] == list(range(1, 13))

CELLS = """
import json, sys
from execnb.shell import CaptureShell
shell = CaptureShell(path='.')
for cell in json.load(open(sys.argv[1]))['cells']:
    if cell['cell_type'] != 'code': continue
    shell.run(''.join(cell['source']))
    if shell.exc: sys.exit(f"{''.join(cell['source'])[:200]}: {shell.exc}")
"""

@pytest.mark.slow
@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_it_runs_on_another_model_in_four_bits(path, tmp_path):
    "As on a T4, where nothing that only the embedded model does may be asserted; few steps"
    for name in ('Qwen2.5-1.5B', 'Qwen2.5-1.5B-Instruct'): shutil.copytree(base(), tmp_path/'Qwen'/name)
    few = dict(model='Qwen/Qwen2.5-1.5B', tokenizer='same', adapter='qlora', max_steps='6', max_length='128',
               per_device_train_batch_size='4', gradient_accumulation_steps='2', learning_rate='2e-4')
    env = os.environ | {f'FTKIT_{k.upper()}': v for k,v in few.items()} | dict(IN_TEST='1', HF_HUB_OFFLINE='1')
    done = subprocess.run([sys.executable, '-c', CELLS, path], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
