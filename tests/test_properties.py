"Laws over random data: any text, any order of lengths, any cut"
import json, os
import numpy as np
from hypothesis import HealthCheck, given, settings, strategies as st
from ftkit.chat import TEMPLATES, render, set_template, spans
from ftkit.core import FtkitError
from ftkit.formats import FORMATS, as_dataset, to_messages
from ftkit.lengths import WAYS, cut_dataset, truncate
from ftkit.mask import encode, encode_dataset
from ftkit.pack import pack, pack_dataset
from ftkit.tiny import tiny

settings.register_profile('ci', derandomize=True) # the same examples every time, where nobody looks
if os.environ.get('CI'): settings.load_profile('ci')
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
many = settings(max_examples=200, deadline=None)
# all of Unicode but surrogates, with what templates, tokenizers and this package itself treat in a special way
odd = st.sampled_from(['', ' ', '\n', '\n\n', '<|im_end|>', '<|im_start|>assistant\n', '</s>', '[/INST]', '<think>',
                       '{{ bos_token }}', '{% raw %}', 'שלום', 'مرحبا', '👩‍👩‍👧', 'e\u0301',
                       'क\u093c', '\u200f', '\ue000', '\x00'])
texts = st.lists(st.one_of(odd, st.text(max_size=20)), max_size=4).map(''.join)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)

def conversation(pairs):
    return [dict(role=role, content=text) for pair in pairs for role,text in zip(('user', 'assistant'), pair)]

def toks():
    for name in TEMPLATES:
        tok,_ = tiny()
        set_template(tok, name)
        yield name, tok
TOKS = dict(toks())

@few
@given(turns, st.sampled_from(list(TEMPLATES)))
def test_spans_and_labels_of_any_conversation(pairs, name):
    "Ids are those of the text, and what is trained is what the assistant wrote, to the byte"
    tok,messages = TOKS[name],conversation(pairs)
    text,found = spans(tok, messages)
    assert text == render(tok, messages)
    example = encode(tok, messages)
    assert example['input_ids'] == tok(text, add_special_tokens=False).input_ids
    assert tok.decode(example['input_ids']) == text
    said = [text[s.start:s.end] for s in found if s.role == 'assistant']
    trained = [i for i,l in zip(example['input_ids'], example['labels']) if l != -100]
    assert tok.decode(trained) == ''.join(said)
    for s in found: assert messages[s.turn]['content'].strip() in text[s.start:s.end]
    assert sorted({s.turn for s in found if s.role == 'assistant'}) == list(range(1, len(messages), 2))

@few
@given(turns)
def test_typed_control_tokens_become_text(pairs):
    tok,messages = TOKS['chatml'],conversation(pairs)
    example = encode(tok, messages, controls='text')
    plain = [dict(m, content='x') if m['role'] == 'user' else m for m in messages]
    marks = {*tok.added_tokens_decoder}
    assert tok.decode(example['input_ids']) == render(tok, messages)
    count = lambda ex: sum(i in marks for i in ex['input_ids'])
    assert count(example) == count(encode(tok, plain))

@few
@given(st.lists(turns, min_size=1, max_size=5))
def test_a_batch_equals_its_rows(many_pairs):
    tok,rows = TOKS['chatml'],[dict(messages=conversation(p)) for p in many_pairs]
    assert list(encode_dataset(tok, rows)) == [encode(tok, r['messages']) | dict(row=i) for i,r in enumerate(rows)]

@few
@given(st.lists(st.tuples(texts, st.booleans()), min_size=1, max_size=6))
def test_segments(pieces):
    tok,segments = TOKS['chatml'],[dict(text=t, label=l) for t,l in pieces]
    if not any(l for _,l in pieces): return
    example = encode(tok, dict(segments=segments))
    assert tok.decode(example['input_ids']) == ''.join(t for t,_ in pieces)
    trained = tok.decode([i for i,l in zip(example['input_ids'], example['labels']) if l != -100])
    wanted = ''.join(t for t,l in pieces if l)
    # nothing of another segment; a control token or a character that two segments share is in neither
    assert trained == wanted or len(trained) < len(wanted)

@many
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 80))
def test_packing_conserves_documents(lengths, max_length):
    found = pack(lengths, max_length)
    assert sorted(d for row in found for d in row) == list(range(len(lengths)))
    assert all(sum(lengths[d] for d in row) <= max_length for row in found)
    assert len(found) <= 11/9*np.ceil(sum(lengths)/max_length) + sum(n > max_length/2 for n in lengths) + 1

@few
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=8), st.integers(1, 30),
       st.sampled_from(WAYS))
def test_cuts_account_for_every_token(rows, max_length, how):
    labels = [[i if t else -100 for i,t in enumerate(r)] for r in rows]
    ds = as_dataset([dict(input_ids=list(range(len(r))), labels=l) for r,l in zip(rows, labels)])
    try: out,report = cut_dataset(ds, max_length, how)
    except FtkitError as e:
        assert 'no row is left' in str(e) or how == 'refuse' and max(map(len, rows)) > max_length
        return
    tokens = sum(map(len, out['input_ids']))
    assert tokens + report.lost == report.tokens == sum(map(len, rows))
    assert sum(l != -100 for r in out for l in r['labels']) + report.untaught == sum(map(sum, rows))
    assert len(out) == report.kept and max(map(len, out['input_ids'])) <= max_length
    if how in ('right', 'left'):
        cut = [truncate(r, max_length, how) for r in ds]
        assert list(out) == [c for c in cut if any(l != -100 for l in c['labels'])]
        last = [max(i for i,t in enumerate(r) if t) if any(r) else -1 for r in rows]
        lost = [at >= max_length if how == 'right' else at < len(r)-max_length for at,r in zip(last, rows)]
        assert report.unended == sum(gone and at >= 0 for gone,at in zip(lost, last))

@few
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(40, 60), st.sampled_from(['bfd', 'wrapped']))
def test_packed_rows_hold_the_same_tokens(lengths, max_length, strategy):
    ids = [[100*k+i for i in range(n)] for k,n in enumerate(lengths)]
    ds = as_dataset([dict(input_ids=i, labels=i) for i in ids])
    packed = pack_dataset(ds, max_length, strategy)
    assert sorted(sum(packed['input_ids'], [])) == sorted(sum(ids, []))
    assert max(map(len, packed['input_ids'])) <= max_length
    for row in packed: # a document starts where its positions do, and its first token is not trained
        for i,(token,p,l) in enumerate(zip(row['input_ids'], row['position_ids'], row['labels'])):
            assert l == (-100 if p == 0 else token)
            assert p == 0 or row['input_ids'][i-1] == token-1
            assert strategy == 'wrapped' or p == token%100

keys = st.sampled_from(['role', 'content', 'from', 'value', 'type', 'text', 'label', 'x'])
json_values = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8),
                           lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=4))

@many
@given(st.sampled_from(list(FORMATS)), st.data())
def test_any_row_is_converted_or_refused(name, data):
    "Whatever stands in the columns of a format: columns of its kind, or an error that names row and field"
    columns = {*FORMATS[name].marks, *FORMATS[name].reads}
    row = {c: data.draw(json_values, c) for c in columns}
    try: out, = to_messages([row], format=name)
    except FtkitError as e: assert str(e).startswith('data row 1: ') and "'" in str(e) and '\n' not in str(e)
    else: json.dumps(out)

@few
@given(texts, texts)
def test_a_vocabulary_with_merges(asked, said):
    "A token may straddle the beginning of an answer; nothing of the answer is lost"
    from ftkit.models import load_tokenizer
    tok = TOKS.get('embedded') or TOKS.setdefault('embedded', load_tokenizer('embedded'))
    example = encode(tok, conversation([(asked, said)]))
    trained = tok.decode([i for i,l in zip(example['input_ids'], example['labels']) if l != -100])
    assert trained.endswith(said + '<|im_end|>') and not trained[:-len(said)-10].strip()

@few
@given(st.lists(turns, min_size=1, max_size=3), st.sampled_from(['qwen3', 'smollm2', 'gpt2']))
def test_places_in_bytes_equal_places_in_characters(shared, many_pairs, name):
    "The fast way to find tokens against the tokenizer's own offsets"
    from unittest.mock import patch
    from transformers import AutoTokenizer
    if name not in TOKS:
        TOKS[name] = AutoTokenizer.from_pretrained(shared/'tokenizers'/name)
        set_template(TOKS[name], 'qwen')
    rows = [conversation(p) for p in many_pairs]
    fast = [encode(TOKS[name], r) for r in rows]
    with patch('ftkit.mask._byte_lengths', lambda *_: None): slow = [encode(TOKS[name], r) for r in rows]
    assert fast == slow
