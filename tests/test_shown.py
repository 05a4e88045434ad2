"A page shows what it exports: a cell that a reader sees calls each function, and names or prints each class"
import ast, json, re
from pathlib import Path
import pytest

PAGES = sorted((Path(__file__).parents[1]/'nbs').glob('[0-9]*.ipynb'))
CHECKS = re.compile(r'\bassert\b|\b(test_\w+|expect_fail|assert_close)\(')

def source(cell): return ''.join(cell['source'])
def is_exported(cell): return cell['cell_type'] == 'code' and source(cell).startswith('#| export')
def is_lesson(cell): return cell['cell_type'] == 'code' and not re.match(r'#\| (export|hide|echo: false)', source(cell))
def patched(node): return any(re.search(r"id='patch'", ast.dump(d)) for d in node.decorator_list)

def defined(cells):
    "The functions and classes that are exported"
    tops = [node for cell in cells if is_exported(cell) for node in ast.parse(source(cell)).body]
    return [n for n in tops if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != '_' and not patched(n)]

def unshown(cells):
    "Names of those that the page does not show"
    lessons = [c for c in cells if is_lesson(c)]
    docments = '\n'.join(source(c) for c in cells if is_exported(c))
    nodes = [n for c in lessons for n in ast.walk(ast.parse(source(c)))]
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    if 'COMMANDS = ' in docments: used |= {n.value for n in nodes if isinstance(n, ast.Constant)} # of the command line
    prose = '\n'.join(source(c) for c in cells if not is_exported(c) and not is_lesson(c))
    words = '\n'.join([prose, *(json.dumps(c['outputs']) for c in lessons), *re.findall(r'`\w+`', docments)])
    named = lambda n: isinstance(n, ast.ClassDef) and re.search(rf'\b{n.name}\b', words)
    return [n.name for n in defined(cells) if n.name not in used and not named(n)]

@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_a_page_shows_what_it_exports(path):
    cells = json.loads(path.read_text())['cells']
    assert defined(cells) and unshown(cells) == []
    assert any(CHECKS.search(source(c)) for c in cells if is_lesson(c))

def test_what_is_not_shown_is_seen():
    def cell(source, kind='code'): return dict(cell_type=kind, source=[source], outputs=[])
    page = [cell('#| export\nclass Box: pass\ndef made(): return Box()\ndef _own(): pass')]
    assert unshown(page) == ['Box', 'made']
    assert unshown([*page, cell('#| hide\nmade()'), cell('call `made`', 'markdown')]) == ['Box', 'made']
    assert unshown([*page, cell('made()'), cell('A `Box` holds things.', 'markdown')]) == []
