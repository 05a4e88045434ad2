"Input as it comes: read right, or refused in one line that names row and field, with nothing written"
import json
import pytest

GOOD = {'instruction': 'Say hello.', 'output': 'Hello!'}
def jsonl(*rows): return '\n'.join(json.dumps(r) for r in rows).encode()
def turns(role): return {'messages': [{'role': role, 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]}

REFUSED = {
    'empty file': (b'', 'data.jsonl: the file is empty'),
    'only white space': (b' \n\n', 'data.jsonl: the file is empty'),
    'broken JSON on line 17': (jsonl(*[GOOD]*16)+b'\n{"instruction": "Say', 'data.jsonl line 17: broken JSON'),
    'broken JSON array': (b'[{"instruction": "a",\n "output": }]', 'data.jsonl line 2: broken JSON'),
    'row without an answer': (jsonl(GOOD, GOOD, {'instruction': 'Hi'}), "data.jsonl row 3: 'output' is missing"),
    'empty answer': (jsonl(GOOD, {**GOOD, 'output': '  '}), "data.jsonl row 2: 'output' is empty"),
    'null answer': (jsonl(GOOD, {**GOOD, 'output': None}), "data.jsonl row 2: 'output' is missing"),
    'unknown role': (jsonl(turns('user'), turns('wizard')), "data.jsonl row 2: 'messages[0].role' is 'wizard'"),
    'column of numbers': (jsonl(*[{'instruction': i, 'output': i+1} for i in range(5)]),
                          "data.jsonl row 1: 'instruction' must be text, found int '0'"),
    'unknown columns': (jsonl(*[{'q': 'a', 'a': 'b'}]*3), 'data.jsonl: columns q, a fit no format'),
    'bare lists': (b'[[1, 2], [3]]', 'data.jsonl: no row has named columns'),
    'not UTF-8': ('{"instruction": "Grüß"}'.encode('latin-1'), 'is not UTF-8'),
    '1 MB string': (jsonl(*[{**GOOD, 'instruction': 'x'*1_000_000}]*4), 'rows are longer than max_length=256 tokens'),
    'one row': (jsonl(GOOD), 'one row is not enough'),
}

@pytest.mark.parametrize('name', REFUSED)
def test_refused_in_one_line(ftkit, tmp_path, name):
    content,says = REFUSED[name]
    (tmp_path/'data.jsonl').write_bytes(content)
    code,_,err = ftkit('sft', 'data.jsonl', '--model', 'embedded', '--out', 'run', '--max-steps', 1)
    assert code == 2
    assert err.count('\n') == 1 and err.startswith('ftkit: ') and says in err
    assert 'Traceback' not in err and len(err) < 500
    assert [p.name for p in tmp_path.iterdir()] == ['data.jsonl']

def test_missing_file(ftkit, tmp_path):
    code,_,err = ftkit('sft', 'nowhere.jsonl', '--out', 'run')
    assert (code, err) == (2, 'ftkit: nowhere.jsonl: no such file\n')
    assert list(tmp_path.iterdir()) == []

READ = {
    'as it should be': jsonl(*[GOOD]*10),
    'Windows line ends': jsonl(*[GOOD]*10).replace(b'\n', b'\r\n'),
    'byte-order mark': b'\xef\xbb\xbf'+jsonl(*[GOOD]*10),
    'both, and blank lines': b'\xef\xbb\xbf'+jsonl(*[GOOD]*10).replace(b'\n', b'\r\n\r\n')+b'\r\n',
    'an array': json.dumps([GOOD]*10).encode(),
}

@pytest.mark.parametrize('name', READ)
def test_read_right(ftkit, tmp_path, name):
    from ftkit.formats import load
    (tmp_path/'data.jsonl').write_bytes(READ[name])
    chat = [dict(role='user', content='Say hello.'), dict(role='assistant', content='Hello!')]
    assert load('data.jsonl')['messages'] == [chat]*10

def test_one_long_row_among_good_ones_is_counted(ftkit, tmp_path):
    good = [{**GOOD, 'instruction': f'Say hello {i} times.'} for i in range(20)]
    (tmp_path/'data.jsonl').write_bytes(jsonl(*good, {**GOOD, 'instruction': 'x'*1_000_000}))
    code,out,err = ftkit('sft', 'data.jsonl', '--model', 'embedded', '--out', 'run', '--max-steps', 1)
    assert code == 0, err
    assert '1 of 19 rows are longer than max_length=256 tokens (the first is row 21 with' in out
    assert ': left out;' in out
    assert 'held out at random' not in out
    assert (tmp_path/'run'/'adapter'/'adapter_model.safetensors').exists()

def test_skip_bad_leaves_out_and_counts(ftkit, tmp_path):
    (tmp_path/'data.jsonl').write_bytes(jsonl(*[GOOD]*20, {**GOOD, 'output': ''}, turns('user')))
    code,out,err = ftkit('sft', 'data.jsonl', '--model', 'embedded', '--out', 'run', '--max-steps', 1, '--skip-bad')
    assert code == 0, err
    assert "left out 2 of 22 rows, the first is row 21: 'output' is empty" in out

def test_a_process_ends_with_code_2(spawn, tmp_path):
    p = spawn('sft', 'nowhere.jsonl')
    out,err = p.communicate(timeout=120)
    assert (p.returncode, out, err) == (2, '', 'ftkit: nowhere.jsonl: no such file\n')

@pytest.mark.parametrize('args,says', [
    (('--max-steps', '0'), 'option: max_steps = 0: must be a positive whole number'),
    (('--adapter', 'loro'), 'adapter = loro: must be one of lora, qlora, full'),
    (('--format', 'alpacca'), "format 'alpacca'"), (('--model', 'no/such'), 'no/such: no tokenizer'),
    (('--r', '0'), 'r=0: the rank'), (('--seed', '-1'), '--seed -1'), (('--batch-size', '-3'), 'must be a positive'),
    (('--learning-rate', '1e30'), 'the loss is not finite at step'),
    (('--held-out', '1.5'), '--held-out 1.5'), (('--mapping', 'output=nope'), "'nope' is missing")])
def test_wrong_options(ftkit, tmp_path, args, says):
    (tmp_path/'data.jsonl').write_bytes(jsonl(*[GOOD]*10))
    code,_,err = ftkit('sft', 'data.jsonl', '--model', 'embedded', '--out', 'run', *args)
    assert code == 2 and says in err and err.count('\n') == 1
    assert not (tmp_path/'run'/'adapter').exists()
    assert 'not finite' in says or not (tmp_path/'run').exists(), 'nothing is written before all has been checked'
