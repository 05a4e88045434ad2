"The whole road on odd rows: weights, flags, kinds and row numbers arrive; spans of odd templates are exact or refused"
import pytest
from ftkit.chat import set_template, spans
from ftkit.core import FtkitError
from ftkit.formats import as_dataset, detect, load, to_messages
from ftkit.lengths import cut_dataset
from ftkit.mask import encode, encode_dataset, typed_controls
from ftkit.mix import mix
from ftkit.pack import Collator, pack_dataset
from ftkit.tiny import tiny

def user(text='q', **more): return dict(role='user', content=text, **more)
def assistant(text='x', **more): return dict(role='assistant', content=text, **more)

@pytest.fixture(scope='module')
def tok():
    tok,_ = tiny()
    set_template(tok)
    return tok

TURN = '<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n'
PROMPT = '{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}TAIL{% endif %}'
LOOP = '{% for m in messages %}' + TURN + '{% endfor %}'
TEMPLATES = {
    'a mark ends the text': (LOOP + PROMPT.replace('TAIL', '<|end_of_chat|>'), ['x<|im_end|>', 'y<|im_end|>']),
    'only the text has an end': ('{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}'
        '{% if add_generation_prompt %}assistant: {% else %}{{ eos_token }}{% endif %}', ['x', 'y\n<|endoftext|>']),
    'headings of words': ('{% for m in messages %}\n### {{ m.role }}:\n{{ m.content }}{% endfor %}'
        '{% if add_generation_prompt %}\n### assistant:\n{% else %}\n### END{% endif %}', ['x', 'y']),
    'the system speaks last': ('{% for m in messages if m.role != "system" %}' + TURN + '{% endfor %}'
        + PROMPT.replace('TAIL', '[RULES: {{ messages[0].content }}]'), ['x<|im_end|>', 'y<|im_end|>']),
    'system in the first question': ('{% for m in messages[1:] %}<|im_start|>{{ m.role }}\n{% if loop.first %}'
        '{{ messages[0].content }}\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}' + PROMPT.replace('TAIL', ''),
        ['x<|im_end|>', 'y<|im_end|>']),
    'texts are trimmed': (LOOP.replace('m.content', 'm.content | trim') + PROMPT.replace('TAIL', ''),
        ['x<|im_end|>', 'y<|im_end|>']),
    'a macro writes': ('{% macro say(m) %}' + TURN + '{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}'
        + PROMPT.replace('TAIL', ''), ['x<|im_end|>', 'y<|im_end|>']),
    'a reminder after each answer': ('{% for m in messages %}' + TURN + '{% if m.role == "assistant" %}'
        '({{ messages[0].content }}){% endif %}{% endfor %}' + PROMPT.replace('TAIL', ''),
        "writes the system's turn 0"),
    'the last is numbered': ('{% for m in messages %}[{{ loop.index }}/{{ messages | length }}]' + TURN + '{% endfor %}'
        + PROMPT.replace('TAIL', ''), 'differently in context'),
    'it divides by nothing': (LOOP + '{{ 1/0 }}', 'refuses these messages')}

@pytest.mark.parametrize('flag', [{}, dict(train=1.)], ids=['by frame', 'the long way'])
@pytest.mark.parametrize('name', TEMPLATES)
def test_spans_of_odd_templates(name, flag):
    tok,_ = tiny()
    tok.chat_template,wanted = TEMPLATES[name]
    chat = [dict(role='system', content='RULE'), user('one'), assistant('x', name=None, **flag), user('two'),
            assistant('y', **flag)]
    if isinstance(wanted, str):
        with pytest.raises(FtkitError, match=wanted): spans(tok, chat)
        return
    text,found = spans(tok, chat)
    assert [text[s.start:s.end] for s in found if s.role == 'assistant'] == wanted
    others = [text[s.start:s.end] for s in found if s.role != 'assistant']
    assert others in (['RULE', 'one', 'two'], ['one', 'two', 'RULE'])

@pytest.mark.parametrize('words', ['a', 'assist', 'assistant', 'user', '<', '[', 'if a <b', '\n', '<|im_end|>',
                                   '<|im_start|>'])
@pytest.mark.parametrize('flag', [{}, dict(train=1.)], ids=['by frame', 'the long way'])
def test_texts_that_look_like_the_template(words, flag):
    "Also when the assistant speaks first"
    tok,_ = tiny()
    tok.chat_template = LOOP + PROMPT.replace('TAIL', '')
    text,found = spans(tok, [assistant(words, **flag), user(words), assistant(words, **flag)])
    assert [text[s.start:s.end] for s in found if s.role == 'assistant'] == [words + '<|im_end|>']*2

def test_weights_in_some_rows_only(tok):
    plain,long = dict(messages=[user(), assistant('short')]),dict(messages=[user('q'*60), assistant('long', train=.5)])
    ds = encode_dataset(tok, [plain]*1000 + [long]*1000 + [plain]*500)
    cut,report = cut_dataset(ds, 40)
    assert report.long == 1000 and {w for r in cut for w in r['weights']} == {0., 1.}
    for strategy in ('bfd', 'wrapped'):
        packed = pack_dataset(ds, 128, strategy)
        assert {w for r in packed for w in r['weights']} == {0., .5, 1.}
        assert all(w == (0 if l == -100 and p else w) for r in packed
                   for w,l,p in zip(r['weights'], r['labels'], r['position_ids']))
    mixed,_ = mix(dict(weighted=ds, plain=encode_dataset(tok, [plain]*10)), n=40, repeat=True)
    assert all(w in ([], [1. if l != -100 else 0. for l in r['labels']]) or .5 in w
               for r in mixed for w in [r['weights'] or []])
    batch = Collator(tok)([ds[0], {k: ds[1][k] for k in ('input_ids', 'labels')}])
    assert batch['weights'].sum() == 2*sum(l != -100 for l in ds[0]['labels'])

def test_a_weighted_step_costs_the_weighted_mean(tok, tmp_path):
    "Two micro-batches, one with weights and one without, cost what the formula says"
    import torch
    from ftkit.logps import label_logps
    from ftkit.train import train
    _,model = tiny()
    rows = [encode(tok, [user('a'), assistant('bcd', train=.25)]), encode(tok, [user('e'), assistant('fg')])]
    batch = Collator(tok)(rows)
    with torch.no_grad():
        logits = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits
    logps,mask = label_logps(logits, batch['labels'])
    weights = mask*batch['weights'][:,1:]
    wanted = -(logps*weights).sum()/weights.sum()
    run = train(model, tok, rows, out=tmp_path/'run', max_steps=1, per_device_train_batch_size=1,
                gradient_accumulation_steps=2)
    assert run.log[0]['loss'] == pytest.approx(wanted.item(), abs=1e-5)

def test_row_numbers_and_reasons(tok):
    good,bad = dict(messages=[user(), assistant(), user(), assistant('y')]),dict(messages=[user()])
    for options in ({}, dict(num_proc=2), dict(per_turn=True), dict(per_turn=True, num_proc=2)):
        with pytest.raises(FtkitError, match='data row 34: there is no assistant turn'):
            encode_dataset(tok, [good]*33 + [bad], **options)
        kept = encode_dataset(tok, [good]*33 + [bad], on_error='skip', **options)
        assert len(kept) == 33*(1 + options.get('per_turn', 0))

def test_labelled_answers_are_not_imitated(tok, tmp_path):
    (tmp_path/'a.csv').write_text('prompt,completion,label\np,good,1\np,bad,0\n')
    ds = load(tmp_path/'a.csv')
    assert [r['label'] for r in ds] == [True, False] and detect(list(ds)).kind == 'unpaired'
    with pytest.raises(FtkitError, match='labelled good or bad'): encode_dataset(tok, ds)

def test_text_in_csv_stays_text(tmp_path):
    (tmp_path/'a.csv').write_text('instruction,output\nq,04\nr,NA\ns,6.10\n')
    assert [m[-1]['content'] for m in load(tmp_path/'a.csv')['messages']] == ['04', 'NA', '6.10']

def test_nothing_of_a_call_is_lost():
    called = dict(name='f', arguments=dict(a=1))
    for turn in (dict(role='assistant', content='hm', function_call=called),
                 dict(role='assistant', content='hm', tool_calls=[dict(name='f', parameters=dict(a=1))])):
        row, = to_messages([[user(), turn]])
        assert [c['function'] for c in row['messages'][-1]['tool_calls']] == [called]
    turn = {'from': 'function_call', 'value': '{"name": "f"}', 'train': False}
    row, = to_messages([dict(conversations=[{'from': 'human', 'value': 'q'}, turn, {'from': 'gpt', 'value': 'x'}])])
    assert row['messages'][1]['train'] is False

def test_splits_of_a_folder_stay_apart(tmp_path):
    for name,n in dict(train=5, test=2).items():
        (tmp_path/f'{name}.jsonl').write_text('{"text": "x"}\n'*n)
    assert (len(load(tmp_path)), len(load(tmp_path, split='test'))) == (5, 2)
    with pytest.raises(FtkitError, match="split 'validation'"): load(tmp_path, split='validation')

def test_another_end_token_is_another_data_set():
    "The key of a cached result names everything that it depends on"
    tok,_ = tiny()
    ds = as_dataset([dict(text='x')])
    first = encode_dataset(tok, ds)[0]['input_ids'][-1]
    tok.eos_token = '<|im_start|>'
    assert encode_dataset(tok, ds)[0]['input_ids'][-1] == tok.eos_token_id != first

def test_packed_rows_are_not_packed_or_cut_again(tok):
    packed = pack_dataset(encode_dataset(tok, [dict(text='x')]*4), 8)
    with pytest.raises(FtkitError, match='packed already'): pack_dataset(packed, 16)
    with pytest.raises(FtkitError, match='cut them before packing'): cut_dataset(packed, 4)

def test_wrapped_packing_keeps_long_texts(tok, tmp_path, capsys):
    from ftkit.train import train
    _,model = tiny()
    train(model, tok, [dict(text='x'*100)]*4, out=tmp_path/'run', max_steps=1, packing='wrapped', max_length=32)
    assert 'packed 4 rows into 13 of 32 tokens' in capsys.readouterr().out

def test_hidden_control_tokens_are_refused_rather_than_kept():
    "A template that looks at the length of a text gives no place where it stands"
    tok,_ = tiny()
    tok.chat_template = ('{% for m in messages %}<|im_start|>{{ m.role }}{% if m.content | length > 15 %}!{% endif %}'
                         '{{ "\\n" }}{{ m.content }}<|im_end|>\n{% endfor %}' + PROMPT.replace('TAIL', ''))
    chat = [user('hi <|im_end|>', name='x'), assistant()]
    assert typed_controls(tok, chat) == []
    with pytest.raises(FtkitError, match='cannot be made text'): encode(tok, chat, controls='text')
