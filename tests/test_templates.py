"Chat templates against transformers: renders byte for byte, who wrote what, ids and masks"
import json
from collections import Counter, defaultdict
import pytest
from ftkit.chat import TEMPLATES, grammar, render, set_template, spans
from ftkit.core import FtkitError
from ftkit.formats import load
from ftkit.mask import encode
from ftkit.tiny import tiny

SPECIAL = dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>', pad_token='<pad>')
TOKENIZERS = 'gpt2', 'qwen3', 'smollm2', 'minimind'

@pytest.fixture(scope='module')
def tok():
    tok,_ = tiny()
    for name,token in SPECIAL.items(): setattr(tok, name, token)
    return tok

@pytest.fixture(scope='module')
def cases(shared):
    "(template, case, conversation, expected) of every render that transformers made"
    chats = json.loads((shared/'templates'/'conversations.json').read_text())
    rows = map(json.loads, (shared/'templates'/'rendered_by_transformers.jsonl').open())
    return [((shared/'templates'/r['template']).read_text(), r, chats[r['case']]) for r in rows]

def test_renders_equal_transformers(tok, cases):
    seen = Counter()
    for jinja,expected,chat in cases:
        tok.chat_template = jinja
        try: text = render(tok, chat['messages'], chat['add_generation_prompt'], chat.get('tools'))
        except FtkitError: seen['refused'] += 1
        else:
            if expected.get('text') is not None: assert text == expected['text'], expected['template']
            assert 'error' not in expected
            seen['dated' if expected.get('text') is None else 'equal'] += 1
    print(dict(seen))
    assert seen['equal'] == sum(r.get('text') is not None for _,r,_ in cases) > 400

def test_renders_equal_the_golden_ones(tok, shared):
    "An independent set: one of them transformers renders differently from its authors, and says so"
    equal = 0
    for row in map(json.loads, (shared/'templates'/'golden_renders_hfjs.jsonl').open()):
        variables = dict(row['variables'])
        messages,tools,prompt = [variables.pop(k, None) for k in ('messages', 'tools', 'add_generation_prompt')]
        tok.chat_template = row['chat_template']
        for name in SPECIAL: setattr(tok, name, variables.pop(name, None))
        if messages is None: continue
        try: text = render(tok, messages, bool(prompt), tools, **variables)
        except FtkitError: text = None
        assert (text == row['expected']) == row['matches_transformers'], row['name']
        equal += text == row['expected']
    print(f'{equal} golden renders equal')
    for name,token in SPECIAL.items(): setattr(tok, name, token)
    assert equal > 8

def test_spans_equal_the_marks_or_hold_the_text(tok, cases):
    "Where a template has marks, they are equal; where it has none, the text is there word for word, or it is refused"
    seen,refused = Counter(),defaultdict(set)
    for jinja,expected,chat in cases:
        if expected.get('text') is None or chat['add_generation_prompt']: continue
        tok.chat_template,messages = jinja,chat['messages']
        marks = expected.get('assistant_spans')
        try: text,found = spans(tok, messages, chat.get('tools'))
        except FtkitError as e:
            assert marks is None, (expected['template'], expected['case'])
            seen['refused'] += 1
            refused[expected['template']].add(str(e)[:70])
            continue
        assert text == expected['text']
        mine = [(s.start, s.end) for s in found if s.role == 'assistant']
        if marks is not None: assert mine == [tuple(m) for m in marks], (expected['template'], expected['case'])
        seen['marks equal' if marks is not None else 'verbatim'] += 1
        for s in found:
            content,there = messages[s.turn]['content'].strip(),text[s.start:s.end]
            if s.role == 'tool' and content not in there: there = json.loads(f'"{there}"') # some write it as JSON
            assert messages[s.turn]['role'] == s.role and (marks is not None or content in there)
            if s.role != 'assistant': assert content == there.strip()
        if marks is None: assert [s.turn for s in found if s.role == 'assistant'] == [
            i for i,m in enumerate(messages) if m['role'] == 'assistant']
    print(dict(seen), f'{len(refused)} templates refuse at least one conversation:')
    for name,reasons in refused.items(): print(' ', name, *sorted(reasons)[:1])
    assert seen['marks equal'] == 90 and seen['verbatim'] > 180

REFERENCES = dict(chatml='trl/qwen3_instruct_2507', qwen='llama.cpp/Qwen-Qwen2.5-7B-Instruct', llama3='trl/llama3',
                  gemma='trl/gemma3', phi='trl/phi3', llama2=None, mistral='chujiezheng/mistral-instruct',
                  zephyr='chujiezheng/zephyr', vicuna='chujiezheng/vicuna')

@pytest.mark.parametrize('name', [n for n,ref in REFERENCES.items() if ref])
def test_built_in_templates_equal_the_published_ones(tok, cases, name):
    "Byte for byte; two of the references were written to be used without their line breaks and indents"
    squeeze = (lambda s: ''.join(s.split())) if REFERENCES[name].startswith('chujie') else (lambda s: s)
    set_template(tok, name)
    seen = Counter()
    for _,expected,chat in cases:
        if expected['template'] != REFERENCES[name]+'.jinja' or expected.get('text') is None: continue
        try: text = render(tok, chat['messages'], chat['add_generation_prompt'], chat.get('tools'))
        except FtkitError:
            assert expected['case'] in ('tool_call', 'assistant_first', 'user_user'), expected['case']
            continue
        if expected['case'] in ('reasoning_content', 'tool_call') and name != 'qwen': continue # ours has no place
        if name in ('mistral', 'vicuna') and 'system' in [m['role'] for m in chat['messages']]: continue # newer form
        assert squeeze(text) == squeeze(expected['text']), expected['case']
        seen['equal'] += 1
    print(name, dict(seen))
    assert seen['equal'] >= 5

def test_llama2_equals_the_golden_template(tok, shared):
    golden = map(json.loads, (shared/'templates'/'golden_renders_hfjs.jsonl').open())
    row = next(r for r in golden if r['name'] == 'llama')
    chat = [dict(role='system', content='Be brief.'), dict(role='user', content=' Hi '),
            dict(role='assistant', content='Hello'), dict(role='user', content='Bye'),
            dict(role='assistant', content='!')]
    for messages in (chat, chat[1:], chat[:2]):
        tok.chat_template = row['chat_template']
        theirs = render(tok, messages)
        set_template(tok, 'llama2')
        assert render(tok, messages) == theirs

def test_grammar_of_real_templates(tok, shared):
    def of(name):
        tok.chat_template = (shared/'templates'/f'{name}.jinja').read_text()
        return grammar(tok)
    assert of('trl/qwen3').history.startswith('the chat template renders turn 1 differently in context')
    assert not of('trl/qwen3_training').history
    assert (of('trl/gemma').system, of('trl/gemma').repeats) == (False, False)
    assert of('trl/llama3').tools is False and of('llama.cpp/Qwen-Qwen2.5-7B-Instruct').tools is True
    assert of('trl/qwen3').thoughts is True and of('trl/llama3').end == '<|eot_id|>'

@pytest.fixture(scope='module')
def chats(shared):
    "200 real conversations"
    files = dict(sharegpt_fastchat_dummy=60, alpaca_gpt4_en_demo=60, messages_openai_list=40, messages_sft_v1=40)
    rows = [r['messages'] for f,n in files.items() for r in load(shared/'datasets'/f'{f}.jsonl').select(range(n))]
    return [[{k: m[k] for k in ('role', 'content')} for m in row] for row in rows]

@pytest.mark.parametrize('name', (*TOKENIZERS, 'stories260K'))
def test_ids_and_masks_equal_transformers(shared, chats, name):
    "Every tokenizer with every template; a tokenizer that puts a BOS before every text does so here as well"
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(shared/('tokenizers' if name in TOKENIZERS else 'models')/name)
    adds = tok('x').input_ids[0] == tok.bos_token_id
    seen,refused = Counter(),Counter()
    for path in sorted(shared.glob('templates/*/*.jinja')):
        tok.chat_template = path.read_text()
        marked = '{% generation' in tok.chat_template or '{%- generation' in tok.chat_template
        options = dict(return_dict=True, return_assistant_tokens_mask=marked)
        for messages in chats:
            try: theirs = tok.apply_chat_template(messages, **options)
            except Exception: # it needs a special token that this tokenizer lacks, or tools
                seen['not by transformers'] += 1
                continue
            ids = list(theirs['input_ids'])
            if lacks := adds and ids[0] != tok.bos_token_id: ids = [tok.bos_token_id, *ids]
            try: mine = encode(tok, messages)
            except FtkitError:
                refused[path.name] += 1
                mine = encode(tok, messages, 'all')
            assert mine['input_ids'] == ids, path.name
            seen['ids'] += 1
            if not marked: continue
            assert [int(l != -100) for l in mine['labels']][lacks:] == theirs['assistant_masks'], path.name
            seen['masks'] += 1
    print(name, dict(seen), 'refused to train on:', dict(refused))
    assert seen['ids'] > 5000 and seen['masks'] == len(chats)*10

def test_every_template_name_is_tested(): assert {*REFERENCES, 'alpaca'} == {*TEMPLATES}
