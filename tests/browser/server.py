"JupyterLab and Voila with every widget of the table"
import json, os, socket, subprocess, sys, time, urllib.error, urllib.request
from pathlib import Path
from test_widgets import CASES, SETUP

HANDS = 'mouse', 'keys', 'deaf' # one copy of each widget for each
CELL = '''for hand in {}:
    box = {}
    box.add_class(f'ft-{}-{{hand}}')
    display(silence(box) if hand == 'deaf' else box)'''
LAB = {'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
       'notebook-extension/tracker': dict(windowingMode='none')}
# Voila takes an icon font from a CDN, which is not reached offline; nothing of ours uses it.
EXPECTED = ('cdn.jsdelivr.net/npm/@fortawesome',)

def notebook(path, *cells):
    "A notebook with these cells after the usual names"
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (SETUP, *cells)])
    nb.metadata.kernelspec = dict(name='python3', display_name='Python 3', language='python')
    nbformat.write(nb, path)
    return path

def all_widgets():
    "Cells that make them; `silence` is what cuts the wires of a copy"
    tests = Path(__file__).resolve().parents[1]
    return [f'import sys\nsys.path.insert(0, {str(tests)!r})\nfrom test_widgets import silence',
            *(CELL.format(HANDS, case.make, name) for name,case in CASES.items())]

class Site:
    "JupyterLab or Voila, its pages, and what their consoles said"
    def __init__(self, kind, browser, folder):
        self.kind,self.browser,self.folder,self.errors = kind,browser,folder,[]
        self.nb = notebook(folder/'widgets.ipynb', *all_widgets())
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.base = f'http://127.0.0.1:{s.getsockname()[1]}'
        port,bin = self.base.split(':')[-1],Path(sys.executable).parent
        self.log = folder/f'{kind}.log'
        command = dict(
            voila=[bin/'voila', self.nb, f'--port={port}', '--Voila.ip=127.0.0.1', '--no-browser',
                   '--show_tracebacks=True'],
            jupyterlab=[bin/'jupyter-lab', f'--port={port}', '--ip=127.0.0.1', '--no-browser', '--allow-root',
                        '--IdentityProvider.token=', f'--ServerApp.root_dir={folder}',
                        '--LabApp.extension_manager=readonly', '--LabApp.expose_app_in_browser=True'])[kind]
        for name,settings in LAB.items():
            extension,plugin = name.split('/')
            file = folder/f'settings/@jupyterlab/{extension}/{plugin}.jupyterlab-settings'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(settings))
        env = {k: v for k,v in os.environ.items() if k != 'IN_TEST'} | dict(
            HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', JUPYTER_CONFIG_DIR=str(folder/'config'),
            IPYTHONDIR=str(folder/'ipython'), JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'),
            JUPYTERLAB_WORKSPACES_DIR=str(folder/'workspaces'))
        command,self.pages = [*map(str, command)],{}
        with open(self.log, 'w') as log: self.server = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def hear(self, error):
        if not any(known in error for known in EXPECTED): self.errors.append(error)

    def wait(self):
        "Until the server answers"
        for _ in range(240):
            assert self.server.poll() is None, self.log.read_text()
            try: return urllib.request.urlopen(self.base + '/static/favicon.ico', timeout=2)
            except urllib.error.HTTPError: return
            except OSError: time.sleep(.5)
        raise AssertionError(f'{self.kind} does not answer: {self.log.read_text()}')

    def open(self, nb, theme='light'):
        "A page on which this notebook runs"
        self.wait()
        page = self.browser.new_page(viewport=dict(width=1100, height=1000))
        page.set_default_timeout(120_000)
        page.on('console', lambda m: m.type == 'error' and self.hear(f'{m.text} {m.location["url"]}'))
        page.on('pageerror', lambda e: self.hear(str(e)))
        page.route(lambda url: not url.startswith((self.base, 'data:', 'blob:')), lambda route: route.abort())
        page.goto(self.base + (f'/?theme={theme}' if self.kind == 'voila' else f'/doc/tree/{nb.name}?reset'))
        if self.kind == 'jupyterlab':
            page.locator('.jp-NotebookPanel .jp-Cell').first.wait_for()
            page.evaluate('jupyterapp.shell.currentWidget.sessionContext.ready')
            page.evaluate('void jupyterapp.commands.execute("notebook:run-all-cells")')
        return page

    def show(self, theme='light'):
        "The page on which every widget has appeared"
        page = self.pages[theme] = self.open(self.nb, theme)
        for name in CASES: page.locator(f'.ft-{name}-{HANDS[-1]}').wait_for()
        return page

    def page(self, theme='light'):
        "JupyterLab changes its theme as it runs, Voila has a page for each"
        if self.kind == 'voila': return self.pages.get(theme) or self.show(theme)
        page = self.pages.get('light') or self.show()
        wanted = f'JupyterLab {theme.title()}'
        if page.evaluate('document.body.dataset.jpThemeName') != wanted:
            page.evaluate('theme => jupyterapp.commands.execute("apputils:change-theme", {theme})', wanted)
            page.wait_for_function('theme => document.body.dataset.jpThemeName == theme', arg=wanted)
        return page

    def close(self):
        self.server.terminate()
        self.server.wait(30)
