"Run the first tutorial from beginning to end and leave what came of it in build/: `make demo`"
import os, re, subprocess, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT/'nbs'/'tutorials'/'01_first_fine_tune.ipynb'

def heading(cell):
    "The heading a markdown cell begins with, if any"
    line = cell.source.split('\n')[0]
    return line.lstrip('# ') if cell.cell_type == 'markdown' and line.startswith('#') else None

def execute(nb, folder):
    "Run a notebook in `folder`, naming each section as it begins"
    start = time.time()
    def say(cell, cell_index):
        if text := heading(cell): print(f'{time.time()-start:5.0f} s  {text}', flush=True)
    # IN_TEST: no progress bars and the static twins of widgets, as nothing can be clicked in a page
    env = {**os.environ, 'IN_TEST': '1'}
    client = NotebookClient(nb, timeout=1800, kernel_name='python3', on_cell_start=say,
                            resources={'metadata': {'path': str(folder)}})
    client.execute(env=env, stderr=subprocess.DEVNULL) # the kernel's own chatter; a cell's error is raised here
    return time.time()-start

def printed(nb, word):
    "The text of the last output that contains a word"
    texts = [o.data.get('text/plain', '') for c in nb.cells for o in c.get('outputs', []) if 'data' in o]
    return [t for t in texts if word in t][-1]

def main():
    "Execute, save, convert, and say what came out"
    build = ROOT/'build'
    build.mkdir(exist_ok=True)
    nb = nbformat.read(NOTEBOOK, 4)
    nb.cells = [c for c in nb.cells if not re.search(r'^#\| hide|COLAB_|colab-badge', c.source)] # for tests, for Colab
    seconds = execute(nb, build)
    nbformat.write(nb, build/'first_fine_tune.ipynb')
    page = HTMLExporter(mathjax_url='', require_js_url='', embed_images=True)
    html,_ = page.from_notebook_node(nb, {'metadata': {'name': 'Your first fine-tune'}})
    (build/'first_fine_tune.html').write_text(html)
    print(f"\n{printed(nb, 'right answers')}\n\n{seconds:.0f} seconds. "
          'Look at build/first_fine_tune.html, or open build/first_fine_tune.ipynb.')
    print('Talk to the tuned model: .venv/bin/ftkit chat build/runs/first')

if __name__ == '__main__': main()
