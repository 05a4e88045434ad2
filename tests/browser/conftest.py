"JupyterLab and Voila in Debian's chromium; `make browser`"
import os, shutil
from pathlib import Path
import pytest
from server import Site

FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-dev-shm-usage',
         '--disable-background-networking', '--disable-component-update', '--disable-sync']

@pytest.fixture(scope='session')
def browser():
    play = pytest.importorskip('playwright.sync_api', reason='no Playwright: run `make browser`')
    chromium = shutil.which('chromium')
    if not chromium: pytest.skip('no chromium: apt-get install chromium')
    with play.sync_playwright() as p:
        found = p.chromium.launch(executable_path=chromium, args=FLAGS)
        yield found
        found.close()

@pytest.fixture(scope='session', params=['voila', 'jupyterlab'])
def site(request, browser, tmp_path_factory):
    made = Site(request.param, browser, tmp_path_factory.mktemp(request.param))
    try: yield made
    finally: made.close()

@pytest.fixture(scope='session')
def shots():
    "Where the screenshots go, to be looked at"
    folder = Path(os.environ.get('FTKIT_SHOTS', 'runs/browser'))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
