"The site is built without a warning, and no link in it leads nowhere"
import os, re, subprocess, sys
from pathlib import Path
from urllib.parse import unquote, urldefrag
import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
SITE = 'https://ftkit.github.io/ftkit/'

def built():
    "As `make docs` builds it; not by make, which may install the environment anew while other tests run in it"
    recipe = re.search(r'^docs:.*\n((?:\t.*\n)+)', (ROOT/'Makefile').read_text(), re.M)[1]
    env = os.environ | dict(PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    done = subprocess.run(['sh', '-ec', recipe], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

@pytest.fixture(scope='module')
def site(tmp_path_factory, worker_id):
    "Built once, whichever of several processes needs it first"
    shared = tmp_path_factory.getbasetemp()
    if worker_id != 'master': shared = shared.parent
    with FileLock(shared/'site.lock'):
        if not (shared/'site.built').exists(): built()
        (shared/'site.built').touch()
    return ROOT/'_docs'

def dead(folder, page):
    "Links of a page to files or places that are not there"
    html = page.read_text(encoding='utf-8')
    out = []
    for link in {*re.findall(r'(?:href|src)="([^"]+)"', html)}:
        path,place = urldefrag(unquote(link))
        if re.match(r'\w+:|//', link): continue
        there = (page.parent/path.partition('?')[0]).resolve() if path else page
        lost = not there.exists() or place and there.suffix == '.html' and f'id="{place}"' not in there.read_text()
        if lost: out.append(link)
    return out

def test_no_link_is_dead(site):
    pages = [p for p in site.rglob('*.html') if '_static' not in p.parts]
    assert len(pages) > 100
    assert {p.name: found for p in pages if (found := dead(site, p))} == {}

def test_a_dead_link_is_seen(tmp_path):
    (tmp_path/'a.html').write_text('<a href="b.html">b</a> <a href="#here">x</a> <p id="there"> <a href="#there">y</a>')
    assert sorted(dead(tmp_path, tmp_path/'a.html')) == ['#here', 'b.html']

def test_programs_can_read_it(site):
    "`llms.txt` names every page, and what it and the modules point at is there"
    named = re.findall(rf'\({SITE}(\S+)\)', (site/'llms.txt').read_text())
    pages = [p for p in (ROOT/'nbs').rglob('*.ipynb') if not {'runs', '.ipynb_checkpoints'} & {*p.parts}]
    assert len(named) == len(pages) and all((site/name).exists() for name in named)
    docs = [re.search(rf'Docs: {SITE}(\S+\.md)', p.read_text())[1] for p in (ROOT/'ftkit').glob('[a-z]*.py')]
    assert docs and all((site/name).exists() for name in docs)
