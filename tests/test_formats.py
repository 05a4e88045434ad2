"Every shared data set loads with each record accounted for; every format refuses what is wrong in one line"
import json
import pytest
from ftkit.core import FtkitError
from ftkit.formats import CONVERSIONS, FORMATS, OBJECTIVES, convert, detect, kind_of, load, read_rows, to_messages

# columns that only their authors know
MAPPINGS = dict(gsm8k_train=dict(prompt='question'), gsm8k_test=dict(instruction='question', output='answer'),
    gsm8k_model_solutions=dict(prompt='question', completion='175b_verification.solution',
                               label='175b_verification.is_correct'),
    alpaca_seed_tasks=dict(input='instances.0.input', output='instances.0.output'))
KINDS = dict(hh_harmless_base='preference', kto_en='unpaired', messages_dpo_v1='preference',
             rasbt_preference='preference', sharegpt_dpo_en='preference', text_c4='text',
             torchtune_hh_rlhf_tiny='preference', gsm8k_train='prompt',
             gsm8k_model_solutions='unpaired')

def test_shared_data_sets_load_whole(shared, capsys):
    for path in sorted((shared/'datasets').iterdir()):
        name = path.name.split('.')[0]
        mapping,rows = MAPPINGS.get(name),list(read_rows(path))
        found,ds = detect(rows, mapping=mapping),load(path, mapping=mapping, on_error='skip')
        with capsys.disabled():
            print(f'{name}: {len(rows)} rows, {found.format}, {len(ds)} used, {len(found.bad)} refused', *found.bad[:1])
        assert len(ds) + len(found.bad) == len(rows)
        assert found.kind == kind_of(ds[0]) == KINDS.get(name, 'messages')
        assert len(found.bad) <= 3 and (not found.bad or name in ('hh_harmless_base', 'rasbt_preference'))
        assert found.confidence == len(ds)/len(rows) and found.objectives == OBJECTIVES[found.kind]

def test_tools_and_thoughts_survive_the_road(shared):
    "From files through Arrow to ids: what a template with a place for them shows is what the file says"
    from ftkit.chat import left_out, one_per_turn, set_template, spans
    from ftkit.mask import encode
    from ftkit.tiny import tiny
    tok,_ = tiny()
    set_template(tok, (shared/'templates'/'trl'/'qwen3_training.jinja').read_text())
    calls = thoughts = 0
    for name in ('sharegpt_glaive_toolcall_en', 'messages_reason_tool_use'):
        path = shared/'datasets'/f'{name}.jsonl'
        for row,stored in zip(to_messages(list(read_rows(path))), load(path), strict=True):
            text,found = spans(tok, row['messages'], row.get('tools'))
            assert left_out(row['messages'], text, found) == []
            direct = encode(tok, row['messages'], tools=row.get('tools'))
            assert encode(tok, stored['messages'], tools=stored['tools']) == direct
            calls += sum(len(m.get('tool_calls') or []) for m in row['messages'])
            thoughts += sum('reasoning_content' in m for m in row['messages'])
            assert len(one_per_turn(row['messages'])) == sum(m['role'] == 'assistant' for m in row['messages'])
    print(f'{calls} tool calls, {thoughts} thoughts')
    assert calls == 152 and thoughts == 64

def test_weights_of_messages(shared):
    rows = list(load(shared/'datasets'/'messages_sft_v1.jsonl'))
    assert {m['train'] for r in rows for m in r['messages'] if m['role'] == 'user'} == {0.}

ASK,ANSWER = dict(role='user', content='Hi'),dict(role='assistant', content='Hello')
OTHER = dict(ANSWER, content='Go away')
GPT = [{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Hello'}]
GOOD = dict(
    messages=dict(messages=[ASK, ANSWER]), sharegpt=dict(conversations=GPT),
    alpaca=dict(instruction='Hi', output='Hello'),
    prompt_completion=dict(prompt='Hi', completion=' Hello'), text=dict(text='Hello'),
    segments=dict(segments=[dict(label=True, text='Hello')]),
    preference=dict(chosen=[ASK, ANSWER], rejected=[ASK, OTHER]),
    sharegpt_preference=dict(conversations=GPT[:1], chosen=GPT[1], rejected={'from': 'gpt', 'value': 'Go away'}),
    alpaca_preference=dict(instruction='Hi', chosen='Hello', rejected='Go away'),
    messages_preference=dict(chosen_messages=[ASK, ANSWER], rejected_messages=[ASK, OTHER]),
    kto=dict(messages=[ASK, ANSWER], label=True), sharegpt_kto=dict(conversations=GPT, label=False),
    unpaired=dict(prompt='Hi', completion=' Hello', label=True), prompt=dict(prompt=[ASK], answer=4))
WRONG = {'missing': 'DROP', 'null': None, 'number': 5, 'blank': '  ', 'empty list': [], 'list of numbers': [1, 2],
         'object': {'a': 1}, 'unknown role': [dict(role='wizard', content='Hi'), ANSWER],
         'half a list': '[{"role": "user"'}

@pytest.mark.parametrize('name', FORMATS)
def test_good_rows_of_every_format(name, tmp_path):
    good = GOOD[name]
    found = detect([good]*3)
    assert (found.format, found.confidence, found.bad) == (name, 1, [])
    (tmp_path/'rows.jsonl').write_text('\n'.join(map(json.dumps, [good]*3)))
    ds = load(tmp_path/'rows.jsonl')
    assert len(ds) == 3 and kind_of(ds[0]) == FORMATS[name].kind

@pytest.mark.parametrize('wrong', WRONG)
@pytest.mark.parametrize('name', FORMATS)
def test_wrong_rows_of_every_format(name, wrong, tmp_path, capsys):
    "Each marked column in turn: refused with file, row and field, or left out and counted"
    good,path = GOOD[name],tmp_path/'rows.jsonl'
    for column in FORMATS[name].marks:
        text = isinstance(good[column], str) and 'prompt' not in FORMATS[name].marks
        if wrong == 'half a list' and text: continue
        bad = {k:v for k,v in good.items() if k != column} | ({} if wrong == 'missing' else {column: WRONG[wrong]})
        path.write_text('\n'.join(map(json.dumps, [good, good, bad])))
        with pytest.raises(FtkitError) as e: load(path, format=name)
        said = str(e.value)
        assert said.startswith(f'{path} row 3: ') and column.split('_')[0] in said
        assert '\n' not in said and len(said) < 400
        assert len(load(path, format=name, on_error='skip')) == 2
        assert f'{path}: left out 1 of 3 rows, the first is row 3: ' in capsys.readouterr().out

def test_conversions_are_a_whole_table():
    "Between any two kinds there is a way that works or a reason"
    for name,good in GOOD.items():
        rows = to_messages([good])
        kind = FORMATS[name].kind
        for to in OBJECTIVES:
            way = CONVERSIONS.get((kind, to))
            if to == kind or callable(way): assert all(kind_of(r) == to for r in convert(rows, to))
            else:
                with pytest.raises(FtkitError, match=f'{kind} to {to}: ') as e: convert(rows, to)
                assert len(str(e.value)) > len(f'{kind} to {to}: ')+10

def test_published_alpaca_prompts():
    from ftkit.formats import alpaca_prompt
    assert alpaca_prompt('Add.', '2 and 2') == (
        'Below is an instruction that describes a task, paired with an input that provides further context. '
        'Write a response that appropriately completes the request.\n\n'
        '### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:')
    assert alpaca_prompt('Say hello.') == (
        'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n'
        '### Instruction:\nSay hello.\n\n### Response:')

def test_other_sources_give_the_same_rows(shared, tmp_path):
    "Packed files, CSV, Parquet, a folder, a saved data set, a URL, a stream, an array"
    import gzip
    import pandas
    path = shared/'datasets'/'alpaca_gpt4_en_demo.jsonl'
    wanted,rows = list(load(path)['messages']),list(read_rows(path))
    (tmp_path/'a.jsonl.gz').write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path/'b.json').write_text(json.dumps(rows, indent=1))
    pandas.DataFrame(rows).to_csv(tmp_path/'c.csv', index=False)
    pandas.DataFrame(rows).to_csv(tmp_path/'c.tsv', index=False, sep='\t')
    pandas.DataFrame(rows).to_parquet(tmp_path/'d.parquet')
    (tmp_path/'folder').mkdir()
    for k,part in enumerate((rows[:200], rows[200:])):
        (tmp_path/'folder'/f'{k}.jsonl').write_text('\n'.join(map(json.dumps, part)))
    load(path).save_to_disk(tmp_path/'saved')
    for name in ('a.jsonl.gz', 'b.json', 'c.csv', 'c.tsv', 'd.parquet', 'folder', 'saved'):
        assert list(load(tmp_path/name)['messages']) == wanted, name
    assert list(load(f'file://{path}')['messages']) == wanted
    assert [r['messages'] for r in load(path, streaming=True)] == wanted

@pytest.mark.parametrize('name,content,says', [
    ('broken.csv', b'instruction,output\n"a', 'cannot be'), ('broken.parquet', b'PAR1 nonsense', 'cannot be'),
    ('empty.csv', b'', ''), ('nowhere.csv', None, 'no such file'), ('nowhere.parquet', None, 'no such file'),
    ('empty', 'folder', 'no data file in this folder'), ('half.jsonl.gz', b'\x1f\x8b\x08nonsense', 'cannot be read')])
def test_files_that_cannot_be_read(tmp_path, name, content, says):
    path = tmp_path/name
    if content == 'folder': path.mkdir()
    elif content is not None: path.write_bytes(content)
    with pytest.raises(FtkitError) as e: load(path)
    assert says in str(e.value) and name in str(e.value) and '\n' not in str(e.value)

def test_streams_that_meet_a_bad_row(tmp_path):
    path = tmp_path/'rows.jsonl'
    path.write_text('\n'.join(map(json.dumps, [GOOD['alpaca']]*1500 + [dict(instruction='Hi', output='')])))
    with pytest.raises(FtkitError, match="row 1501: 'output' is empty"): list(load(path, streaming=True))
    assert len(list(load(path, streaming=True, on_error='skip'))) == 1500
