"Every figure of the seeds is decided on the page of the ledger, and quoted as it stands there"
import csv, json, re
from collections import Counter
from pathlib import Path
import pytest

PAGE = Path(__file__).resolve().parents[1]/'nbs'/'explanations'/'seed_ledger.ipynb'
IDS = [f'n{k:03}' for k in range(1, 181)]
VERDICTS = {'reproduced', 'measured', 'encoded', 'partly', 'wrong', 'dated', 'needs a GPU', 'unverifiable'}
REASON = VERDICTS - {'reproduced', 'measured', 'encoded'}
SOURCES = {'method page': '000', 'agent reference': '002', 'guide': '003', 'notes': '004'}

def cells(): return json.loads(PAGE.read_text(encoding='utf-8'))['cells']

def claims():
    "What the page's code quotes: (id, where, what, figure)"
    code = '\n'.join(''.join(c['source']) for c in cells() if c['cell_type'] == 'code')
    return [tuple(x.strip() for x in line.split('|')) for line in re.findall(r'^n\d{3} \|.*$', code, re.M)]

def decided():
    "What the page's last cell says: id -> [figure, verdict, has it a reason?]"
    return json.loads(''.join(cells()[-1]['outputs'][0]['text']))

def whole(rows, quoted):
    "Every row is there once, is quoted as it was decided, and has a verdict, with a reason where it needs one"
    assert [id for id,*_ in quoted] and Counter(id for id,*_ in quoted) == Counter(IDS)
    assert {*rows} == {*IDS}
    for id,_,_,figure in quoted:
        said,verdict,why = rows[id]
        assert said == figure and verdict in VERDICTS and (why or verdict not in REASON), id

def test_180_of_180_rows_are_decided(): whole(decided(), claims())

@pytest.mark.parametrize('id', IDS[::60])
def test_a_missing_row_is_noticed(id):
    rows = decided()
    del rows[id]
    with pytest.raises(AssertionError): whole(rows, claims())
    with pytest.raises(AssertionError): whole(decided(), [c for c in claims() if c[0] != id])
    with pytest.raises(AssertionError): whole(decided() | {id: ['2', 'surely', True]}, claims())
    with pytest.raises(AssertionError): whole(decided(), [*claims(), claims()[0]])

def test_the_summary_is_the_count():
    "The table at the top of the page, which no cell computes"
    text = '\n'.join(''.join(c['source']) for c in cells()[:3])
    told = {name: int(n) for name,n in re.findall(r'^\| ([\w ]+) \| (\d+) \|', text, re.M)}
    assert told == Counter(verdict for _,verdict,_ in decided().values()) and sum(told.values()) == 180

def test_nothing_on_the_page_went_wrong():
    outputs = [o for c in cells() for o in c.get('outputs', [])]
    assert len(outputs) > 20 and all(o['output_type'] != 'error' and o.get('name') != 'stderr' for o in outputs)

def numbers(text): return re.findall(r'\d+(?:\.\d+)?(?:e-?\d+)?', text.replace(',', ''))
def words(text): return {*re.findall(r'[a-z]{2,}', text.lower())} - {'yes', 'no', 'or'}

def agrees(figure, row):
    "The same numbers in the same order; the same words where there are none"
    said = row['value']
    if '=yes' in said: return figure.split() == re.findall(r'([\w-]+)=yes', said)
    return numbers(figure) == numbers(said) if numbers(said) else words(said) <= words(figure)

@pytest.fixture(scope='module')
def seeds(shared):
    with open(shared.parent/'reference'/'seed_numbers.csv') as f: return {r['id']: r for r in csv.DictReader(f)}

def test_the_page_has_the_rows_of_the_seeds(seeds): assert {*seeds} == {*IDS} == {*decided()}

@pytest.mark.parametrize('id', IDS)
def test_every_figure_is_the_seeds(seeds, id):
    _,where,_,figure = next(c for c in claims() if c[0] == id)
    row,(name,line) = seeds[id],where.split(', line ')
    assert agrees(figure, row), (figure, row['value'])
    files,lines = row['seed_file'].split('; '),row['line'].split()
    assert files[0].startswith(SOURCES[name]) and lines[0].removeprefix(f'{SOURCES[name]}:') == line

def test_another_figure_is_noticed(seeds):
    for id,wrong in dict(n001='5 x', n157='cosine', n170='SFT RL').items(): assert not agrees(wrong, seeds[id])
    assert agrees('~4 x', seeds['n001']) and agrees('linear', seeds['n157'])
