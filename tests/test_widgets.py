"Every widget without a browser: each control changes what is shown; the same under ipywidgets 7 (`make browser`)"
import os
from typing import NamedTuple
import ipywidgets as w, pytest
from ftkit.choose import APPROACH, METHOD

SETUP = '''import itertools, json, os, tempfile
from pathlib import Path
os.environ.pop('IN_TEST', None)
from ftkit.live import *
from ftkit.models import load_model, load_tokenizer
from ftkit.simulate import simulate
from transformers import AutoConfig
from ftkit.tasks import rows
from ftkit.widgets import *
tok = load_tokenizer('embedded')
model = load_model('embedded', tok, adapter=None)
chats = [r['messages'] for r in rows(3)]
llama = dict(model_type='llama', hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
             vocab_size=128256, intermediate_size=8192)
traced = simulate(AutoConfig.for_model(**llama | dict(num_hidden_layers=2)), length=256, loss='plain')
folder,numbers = tempfile.TemporaryDirectory(),itertools.count()
run = Path(folder.name)
lines = [dict(step=step, prompt='Add 2 and 3.', completion=str(n), scores=[float(n == 5)], advantage=n-5.)
         for step in (1, 2, 3) for n in range(step+1, step+4)]
(run/'rollouts.jsonl').write_text(''.join(json.dumps(line)+'\\n' for line in lines))
def new_file(): return run/f'decisions{next(numbers)}.jsonl'
def short(completions, **_): return [-len(c) for c in completions]
'''
# In an order in which each answer has something to add.
QUESTIONS = [APPROACH[k] for k in ('measured', 'prompted', 'enough', 'changing', 'examples', 'far', 'text')]
QUESTIONS += [text for text in APPROACH.values() if text not in QUESTIONS]
ANSWERS = dict(how=1000, are='no')

QUIET = False # a control that shows nothing by itself
class Case(NamedTuple):
    "A widget, and what a person does to it: (name of the control, what it then says, text that is seen in the picture)"
    make: str
    steps: list

CASES = dict(
    chat_box=Case("chat_box(model, tok, ['What is the capital of Peru?'], max_new_tokens=4)",
                  [('You', 'Add 2 and 3.', 'Add 2 and 3.')]),
    token_browser=Case('token_browser(tok, rows(3), chats)', [('row', 2, None)]),
    lora_lab=Case('lora_lab(model)', [
        ('r', 32, 'B 384 × 32'), ('alpha', 128, '<b>4</b>'), ('targets', 'attention', '<b>24</b>'),
        ('rslora', True, None), ('dora', True, None)]),
    nf4_lab=Case('nf4_lab()', [('kind', 'int4', None), ('block', 256, None), ('double', True, None)]),
    memory_lab=Case('memory_lab(llama)', [
        ('optim', 'sgd', None), ('length', 4096, None), ('batch', 4, None), ('method', 'qlora', None),
        ('attention', 'eager', None), ('loss', 'plain', None), ('checkpointing', True, None),
        ('objective', 'dpo', None)]),
    what_if_lab=Case("what_if_lab(llama, 'l4')", [
        ('gpu', 'h200', 'on h200'), ('length', 8192, None), ('method', 'full', None), ('batch', 8, None),
        ('checkpointing', True, None)]),
    timeline_lab=Case('timeline_lab(traced)', [('at', .9, None)]),
    template_lab=Case('template_lab(tok, chats[0])', [
        ('template', 'llama3', 'header'), ('train on', 'all', None), ('1 user', 'Add 1 and 1.', None),
        ('2 assistant', '2', None)]),
    diff_lab=Case('diff_lab(tok, chats[0])', [('first', 'zephyr', 'differ'), ('second', 'zephyr', 'the same text')]),
    chooser=Case('chooser()', [(text, ANSWERS.get(text.split()[0], 'yes'), None) for text in QUESTIONS]),
    method_chooser=Case("chooser('method')", [(text, 'yes', None) for text in METHOD.values()]),
    adapter_chooser=Case('adapter_chooser(llama)', [
        ('gpu', 'a100', None), ('priority', 'memory', None), ('length', 16384, None), ('batch', 32, None)]),
    packing_lab=Case('packing_lab([5, 3, 9, 2, 7])', [('strategy', 'padded', None), ('max length', 32, None)]),
    schedule_lab=Case('schedule_lab()', [('name', 'cosine', None), ('steps', 500, None), ('peak', '0.0001', None),
                                         ('end', '1e-05', None), ('warmup', .2, None)]),
    batch_lab=Case('batch_lab()', [('target', 64, '64'), ('gpus', 4, None), ('per device', 4, None)]),
    dpo_lab=Case('dpo_lab()', [('beta', .5, None), ('loss type', 'ipo', None), ('chosen', 3, None),
                               ('rejected', -2, None)]),
    grpo_lab=Case('grpo_lab()', [('scale', 'none', None), ('baseline', 'others', None), ('epsilon', .1, None),
                                 ('epsilon high', .3, None), *((f'answer {i}', .5, None) for i in (1, 2, 3, 4))]),
    reward_bench=Case("reward_bench(short, ['Add 2 and 3.', 'Why?'], ['It is 5.', 'Because.'])",
                      [('1 Add 2 and 3.', '5', '-1'), ('2 Why?', 'So it is.', '-9')]),
    rollout_browser=Case('rollout_browser(run)', [('step', 2, 'of step 2'), ('answers', 1, '1 of 3 answers')]),
    review=Case('review(rows(3), new_file())', [
        ('answer', '27', QUIET), ('reason', 'a slip', QUIET), ('keep', None, '1 mended, 0 dropped: row 2'),
        ('drop', None, '1 dropped: row 3'), ('back', None, 'row 2')]),
    compare_chat=Case("compare_chat(dict(base=model, same=model), tok, ['Why?'], max_new_tokens=4)",
                      [('You', 'Add 2 and 3.', 'Add 2 and 3.')]))

def parts(box):
    "A widget and all that is in it"
    return [box, *(p for child in getattr(box, 'children', ()) for p in parts(child))]

def find(box, name):
    "The control that a person would call `name`"
    return next(p for p in parts(box) if getattr(p, 'description', '') == name and not isinstance(p, w.HTML))

def give(control, value):
    "What the front end does when a person operates the control"
    if isinstance(control, w.Button): control.click()
    elif hasattr(control, 'label'): control.label = str(value)
    else: control.value = type(control.value)(value)

def picture(box):
    "All that the widget shows and that is no control"
    outputs = [str(o) for p in parts(box) if isinstance(p, w.Output) for o in p.outputs]
    return '\n'.join([*(str(p.value) for p in parts(box) if isinstance(p, (w.HTML, w.Image))), *outputs])

def check(box, name, value, sees):
    "Operate a control: the picture is another one, and `sees` stands in it"
    before = picture(box)
    give(find(box, name), value)
    if sees is QUIET: return
    assert picture(box) != before, f'{name} changes nothing'
    assert (sees or '') in picture(box)

def silence(box):
    "The same widget with its wires cut"
    for p in parts(box):
        p.unobserve_all('value')
        if isinstance(p, w.Button): p._click_handlers.callbacks.clear()
    return box

@pytest.fixture(scope='module')
def names():
    "The names that a notebook has after `SETUP`"
    made,test = {},os.environ.pop('IN_TEST', None)
    exec(SETUP, made)
    yield made
    if test: os.environ['IN_TEST'] = test

@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_every_control_changes_the_picture(names, case):
    box = eval(case.make, names)
    for step in case.steps: check(box, *step)

@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_every_control_is_in_the_table(names, case):
    box = eval(case.make, names)
    controls = [p for p in parts(box) if isinstance(p, w.Button) or hasattr(p, 'value') and not isinstance(p, w.HTML)]
    named = {p.description for p in controls} - {''} # a slider beside a box has no name
    assert named == {name for name,*_ in case.steps}

@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_the_check_finds_a_widget_that_does_not_listen(names, case):
    box = silence(eval(case.make, names))
    for step in (s for s in case.steps if s[-1] is not QUIET):
        with pytest.raises(AssertionError, match='changes nothing'): check(box, *step)

@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_there_is_a_static_twin(names, case, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    twin = eval(case.make, names)
    assert not isinstance(twin, w.Widget) and (hasattr(twin, '_repr_html_') or hasattr(twin, 'savefig'))

def test_every_widget_is_in_the_table():
    import ftkit.live, ftkit.widgets
    no_widgets = 'reply talk still html lab number power curves monitor decisions decide reviewed'.split()
    made = {n for m in (ftkit.widgets, ftkit.live) for n in m.__all__ if callable(getattr(m, n))}
    assert made - {*no_widgets} == {case.make.split('(')[0] for case in CASES.values()}
