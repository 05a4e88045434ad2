"The docs site: Sphinx reads what `nbdev.serve.proc_nbs` wrote to `_proc`, and does here what nbdev leaves to Quarto"
import json
import re
from pathlib import Path

import yaml
from nbdev.config import nbpath2html

REPO,SITE = 'https://github.com/ftkit/ftkit', 'https://ftkit.github.io/ftkit'
FOLDERS = dict(tutorials='The guide', explanations='Explanations')
FLOORS = {0: 'Core', 5: 'Decide', 10: 'Data', 20: 'Model', 30: 'Objective', 40: 'Learn', 50: 'Watch',
          60: 'Deliver', 70: 'Face'}
TAGS = {'echo: false': 'remove-input', 'output: false': 'remove-output', 'code-fold: true': 'hide-input'}
STYLE = '''<style>
.subtitle {font-size: 1.25em; opacity: .75}
.source {float: right; margin-top: -2.4em; font-size: .8em}
.bd-article pre {font-size: .8rem}
.cell_output .text_html pre {color: inherit}
:is(.bd-article :is(h2, h3), .page-toc) code {padding: 0; border: 0; background: none; color: inherit}
</style>'''

project = html_title = 'ftkit'
author = 'the ftkit team'
root_doc = 'index'
include_patterns = ['**.ipynb']
extensions = ['myst_nb']
nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'attrs_inline', 'colon_fence']
myst_heading_anchors = 3
suppress_warnings = ['myst.header'] # a symbol is an H3 also where no H2 stands above it; Sphinx nests it all the same
html_theme = 'sphinx_book_theme'
html_copy_source = html_use_index = False
html_theme_options = dict(repository_url=REPO, repository_branch='main', path_to_docs='nbs',
    use_repository_button=True, use_issues_button=True, use_source_button=True, use_download_button=False,
    navbar_persistent=[], show_toc_level=2, launch_buttons=dict(colab_url='https://colab.research.google.com'))

def contents(docs):
    "Hidden tables of contents: the guide, a chapter for each floor of the modules, and explanations"
    chapters = {o: [] for o in ('tutorials', *FLOORS.values(), 'explanations')}
    for doc in sorted(docs):
        folder,_,name = doc.rpartition('/')
        chapters[folder or FLOORS[max(o for o in FLOORS if o <= int(name[:2]))]].append(doc)
    toc = ':::{toctree}\n:hidden:\n:caption: '
    return [toc + '\n'.join([FOLDERS.get(o, o), '', *c, ':::']) for o,c in chapters.items() if c]

def link(text, env):
    "Point nbdev's links (mask.html#encode) at the pages of this site (/12_mask.ipynb#encode)"
    pages = {nbpath2html(f'{doc}.ipynb').as_posix(): doc for doc in env.found_docs}
    def repl(m):
        if not (doc := pages.get(m[1])): return m[0]
        page = env.doc2path(doc).read_text(encoding='utf-8').lower()
        names = m[2], m[2].partition('.')[0] # a method without a heading of its own is found under its class
        return f'](/{doc}.ipynb' + next(('#' + o.replace('.', '') for o in names if rf'### {o}\n' in page), '') + ')'
    return re.sub(rf'\]\((?:{SITE})?/([\w/-]+\.html)#?([\w.]*)\)', repl, text)

def symbol(m): return f'{m[2]} `{m[3]}`' + (f'\n\n[source]({REPO}{m[1]}){{.source}}' if m[1] else '')

PLAIN = {} # the Markdown of each page

def plain(cells):
    "Prose and code, without what is for Sphinx alone"
    seen = [c for c in cells if 'remove-input' not in c['metadata'].get('tags', [])]
    text = '\n\n'.join(f'```python\n{c["source"]}\n```' if c['cell_type'] == 'code' else c['source'] for c in seen)
    text = re.sub(r':::\{toctree\}.*?:::\s*|<!--.*?-->\s*', '', text, flags=re.S)
    return re.sub(r'^\[(.*)\]\{\.subtitle\}', r'> \1', text, count=1, flags=re.M)

def read(app, docname, source):
    "Front matter becomes the title, `show_doc`'s output prose with headings, Quarto's directives tags"
    nb = json.loads(source[0])
    nb['metadata'].setdefault('language_info', dict(name='python', pygments_lexer='ipython3'))
    for cell in nb['cells']:
        kind,text = cell['cell_type'], ''.join(cell['source'])
        if kind == 'raw' and text.startswith('---'):
            meta = yaml.safe_load(text.strip().strip('-'))
            toc = contents(app.env.found_docs - {root_doc}) if docname == root_doc else []
            head = [f"# {meta['title']}", f"[{meta.get('description', '')}]{{.subtitle}}"]
            kind,text = 'markdown', '\n\n'.join(head + toc)
        elif kind == 'code' and re.search('^show_doc', text, re.M) and cell['outputs']:
            kind,text = 'markdown', ''.join(cell.pop('outputs')[0]['data']['text/markdown'])
            del cell['execution_count']
            text = re.sub(r'^---\s+(?:\[source\]\(\S*?(/blob/\S+?)(?:#LNone)?\)\{.*?\}\s+)?(#+) (.*)', symbol, text)
        elif kind == 'code':
            tags = [tag for o,tag in TAGS.items() if f'#| {o}' in text]
            cell['metadata'].setdefault('tags', []).extend(tags)
        text = re.sub(r'^#\|.*\n?', '', text, flags=re.M)
        text = re.sub(r'\[!\[(.+?)\]\(http.+?\)\]\((.+?)\)', r'[\1](\2)', text) # a badge is a picture from elsewhere
        cell.update(cell_type=kind, source=link(text, app.env) if kind == 'markdown' else text)
    PLAIN[docname] = plain(nb['cells'])
    source[0] = json.dumps(nb)

def finish(app, error):
    "For programs that read: `llms.txt`, and every page as Markdown; both under the names that nbdev gives to pages"
    if error: return
    out,lines = Path(app.outdir),[f'# {project}', '', '> The fine-tuning guide you can run', '']
    for doc in sorted(PLAIN, key=lambda d: (d != root_doc, not d.startswith('tutorials'), d)):
        name,here = nbpath2html(f'{doc}.ipynb'),Path(doc).name
        title,about = re.match(r'# (.+)\s+> (.*)', PLAIN[doc]).groups()
        (out/f'{name}.md').write_text(PLAIN[doc], encoding='utf-8')
        moved = f'<meta http-equiv="refresh" content="0; url={here}.html"><a href="{here}.html">{title}</a>'
        if not (out/name).exists(): (out/name).write_text(moved, encoding='utf-8')
        lines.append(f'- [{title}]({SITE}/{name}.md): {about}')
    (out/'llms.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')

def style(app, page, template, context, doctree): context['metatags'] = context.get('metatags', '') + STYLE

def setup(app):
    "Sphinx calls this"
    app.connect('source-read', read)
    app.connect('html-page-context', style)
    app.connect('build-finished', finish)
