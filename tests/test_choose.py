"Advice: every bullet of the guide's framework and every leaf of the trees is reached, and stands where it says it does"
import re
import pytest
from ftkit.choose import (ADAPTERS, AMOUNTS, APPROACHES, FRAMEWORKS, HARDWARE, METHOD_RULES, MODELS, SIZES, advise,
                          choose_adapter, choose_approach, choose_base, choose_data, choose_framework, choose_method,
                          claims, hardware)
from ftkit.core import FtkitError
from ftkit.memory import METHODS, estimate, parts

TRIED = dict(measured=True, prompted=True)
BULLETS = { # line of the guide or the notes -> (what is known, the choice it speaks for, or warns of)
    'guide, line 18': (dict(), 'prompt'), 'guide, line 19': (dict(), 'prompt'),
    'guide, line 20': (TRIED | dict(enough=False), 'retrieval'), 'guide, line 21': (dict(prompted=True), 'prompt'),
    'guide, line 22': (TRIED | dict(enough=False, examples=20), 'collect examples'),
    'guide, line 23': (TRIED | dict(examples=500), 'fine-tune'),
    'guide, line 29': (TRIED | dict(own=True), 'fine-tune'),
    'guide, line 30': (TRIED | dict(unique=True), 'fine-tune'),
    'guide, line 31': (TRIED | dict(beyond=True), 'fine-tune'),
    'guide, line 32': (TRIED | dict(staff=False, strict=True), 'a service that tunes'),
    'guide, line 38': (TRIED | dict(unknown=True, strict=True), 'fine-tune'),
    'guide, line 39': (TRIED | dict(facts=True, strict=True), 'fine-tune'),
    'guide, line 40': (TRIED | dict(keep=True, strict=True), 'fine-tune'),
    'guide, line 41': (TRIED | dict(far=True, strict=True), 'fine-tune'),
    'notes, line 16': (TRIED | dict(enough=False), 'fine-tune'),
    'notes, line 17': (TRIED | dict(changing=True), 'retrieval'),
    'notes, line 18': (TRIED | dict(far=True, text=True), 'continued pre-training'),
    'notes, line 19': (TRIED | dict(strict=True), 'fine-tune')}

@pytest.mark.parametrize('line', BULLETS)
def test_every_bullet_speaks(line):
    "Where what it is about is known, and not where it is not"
    known,choice = BULLETS[line]
    said = {a.choice: [s for _,s in a.reasons + a.warnings] for a in choose_approach(**known)}
    assert line in said[choice]
    calm = choose_approach(**TRIED | dict(strict=True)) if known else choose_approach(**TRIED)
    assert line == 'notes, line 19' or not any(line in (s for _,s in a.reasons + a.warnings) for a in calm)

def test_every_rule_has_its_bullet():
    assert {r.source for r in APPROACHES} == {*BULLETS}

def test_the_ranking():
    "What decides comes first"
    first = lambda **known: choose_approach(**known)[0].choice
    assert first() == 'prompt' and first(examples=10**6, strict=True) == 'prompt'
    assert first(**TRIED, enough=True) == 'prompt' and first(**TRIED, changing=True, facts=True) == 'retrieval'
    assert first(**TRIED, enough=False, strict=True, examples=1000) == 'fine-tune'
    assert first(**TRIED, far=True, text=True) == 'continued pre-training'
    assert first(**TRIED, enough=False, examples=10) == 'collect examples'
    assert all(a.choice != 'collect examples' for a in choose_approach(**TRIED, enough=False)) # nobody said how many
    assert choose_approach(**TRIED) == [] # nothing speaks for anything

LEAVES = [(dict(reward=True), 'grpo'), (dict(reward=True, pairs=True), 'grpo'), (dict(pairs=True), 'dpo'),
          (dict(labels=True), 'kto'), (dict(examples=True), 'sft'), (dict(examples=False), 'make data first'),
          (dict(), 'sft'),
          (dict(pairs=True, one_stage=True), 'orpo'), (dict(pairs=True, rank=True), 'reward model'),
          (dict(pairs=True, examples=True), 'dpo'), (dict(labels=True, examples=True), 'kto')]

@pytest.mark.parametrize('known,leaf', LEAVES, ids=lambda x: str(x))
def test_every_leaf_of_the_tree(known, leaf):
    assert choose_method(**known)[0].choice == leaf

def test_every_method_is_a_leaf():
    assert {r.choice for r in METHOD_RULES} == {leaf for _,leaf in LEAVES}
    assert all(any(r.where(k) for k in map(dict_of, (k for k,_ in LEAVES))) for r in METHOD_RULES)

def dict_of(known):
    from ftkit.choose import Known
    return Known(known)

WORDS = { # of the line that a source names
    'guide': {
        18: 'prompt engineering', 19: 'closed-source', 20: 'retrieval', 21: 'evaluation', 22: 'dataset', 23:
        'enough data', 29: 'ownership', 30: 'Customizability', 31: 'moderation', 32: 'providers', 38:
        'distance', 39: 'hallucination', 40: 'forgetting', 41: 'Limited knowledge', 123: '1,000', 128:
        'LIMA', 138: 'Yi models', 139: '10 million', 141: '1 million',
        152: '100,000', 538: 'QLoRA preferred', 540: 'LoRA preferred', 711:
        'License', 712: 'Budget', 713: 'Performance', 717: 'Llama 3.1'},
    'method page': {
        78: 'Reward Modeling', 85: 'GRPO', 94: 'DPO', 99: 'KTO', 104: 'SFT', 108: 'create training data',
        113: 'When in doubt', 118: 'Data complexity', 119: 'Compute cost', 125: 'ORPO', 132: 'Slight degradation', 144:
        'Very close to full', 158: 'Highest potential quality', 171: 'Training speed'},
    'notes': {
        16: 'prompting', 17: 'RAG', 18: 'pre-training', 19: 'tightly', 33: 'quality', 35: 'Distillation', 39:
        'learns less and forgets less', **{n: f'| [{name}]' for n,name in enumerate(FRAMEWORKS, 63)}}}
KEYWORDS = {f'{name}, line {n}': word for name,lines in WORDS.items() for n,word in lines.items()}

def sources():
    "Every source that an advice names"
    said = [r.source for r in APPROACHES + METHOD_RULES]
    said += [s for both in ADAPTERS.values() for rows in both for _,s in rows] + [m.source for m in MODELS]
    scored = choose_base(budget='large', scores={MODELS[0].name: 1.})
    advised = *scored, *choose_framework(), *(choose_data(goal, 10) for goal in AMOUNTS)
    for a in advised: said += [s for _,s in a.reasons + a.warnings]
    return {s for s in said if not s.startswith('huggingface.co/')}

def test_sources_stand_where_they_are_said_to(shared):
    "The line that an advice names is about it"
    files = {'guide': '003', 'notes': '004', 'method page': '000'}
    lines = {name: next((shared.parent/'seeds').glob(f'{n}*')).read_text().split('\n') for name,n in files.items()}
    assert sources() == {*KEYWORDS}
    for source,word in KEYWORDS.items():
        name,n = re.fullmatch(r'(.*), line (\d+)', source).groups()
        assert word.lower() in lines[name][int(n)-1].lower(), source

def test_the_hardware_table_is_the_method_pages(shared):
    "Cell by cell, and each has its number in the ledger"
    import csv
    with open(shared.parent/'reference'/'seed_numbers.csv') as f: rows = {r['id']: r for r in csv.DictReader(f)}
    for (size,method),(low,high,gpus,claim) in HARDWARE.items():
        text = ' '.join(map(str, rows[claim].values()))
        assert f'{size} model' in text and dict(qlora='QLoRA', lora='LoRA (bf16)', full='Full')[method] in text
        many = f'{low//80}-{high//80}x 80' if gpus > 2 else f'{gpus}x 80'
        shown = many if low >= 160 else f'{low}+' if high is None else f'{low}-{high}'
        assert shown in text, (size, method)

def test_each_size_is_of_its_size():
    for size,models in SIZES.items():
        low,high = map(float, re.fullmatch(r'(\d+)-(\d+)B', size).groups())
        for c in models: assert .85*low <= sum(p.size for p in parts(c))/1e9 <= 1.08*high

def test_every_cell_has_a_figure():
    "Each is what `estimate` says, and the verdicts are those of the figures, seen by hand"
    cells = {(c.size, c.method): c for c in hardware()}
    assert len(cells) == 15 and all(0 < c.least < c.most <= c.without for c in cells.values())
    small,large = SIZES['7-8B']
    lora = cells['7-8B', 'lora']
    assert lora.least*2**30 == estimate(small, 'lora', 512, checkpointing=True).allocated
    assert lora.most*2**30 == estimate(large, 'lora', 2048, 2, checkpointing=True).allocated
    assert lora.says == (16, 24) and 16 < lora.most < 24 < lora.without and lora.verdict == 'holds'
    assert cells['1-3B', 'qlora'].most < 5 < 6 and cells['1-3B', 'qlora'].verdict == 'more than it takes'
    other = {(c.size, c.method): c.verdict for c in hardware(1e9)}
    assert other['70-72B', 'qlora'] == 'holds for less' # 52 of 48 GB, and a smaller one takes 44

def test_every_figure_of_the_sources(shared):
    "Is beside ours, and says what the ledger says: each number of it is in the ledger's line"
    import csv
    with open(shared.parent/'reference'/'seed_numbers.csv') as f: rows = {r['id']: r for r in csv.DictReader(f)}
    found = {c.id: c for c in claims()}
    about = {f'n{k:03}' for k in (*range(31, 45), 97, 100, 101, 102, 112, 113)}
    assert {*found} == about
    for id,c in found.items():
        text = f"{rows[id]['claim']} {rows[id]['value']} {rows[id]['condition']}"
        said = re.findall(r'\d+(?:\.\d+)?', c.says)
        assert said and all(n in re.findall(r'\d+(?:\.\d+)?', text) for n in said), (id, c.says, text)
    assert found['n037'].verdict == found['n038'].verdict == 'depends' and found['n097'].verdict == 'holds'
    weights = 2*sum(p.size for p in parts(SIZES['7-8B'][0]))/1e9
    assert f'{weights:.1f} to ' in found['n101'].ours and found['n101'].verdict == 'more than it takes'

def test_adapters_by_what_fits():
    small,large = SIZES['1-3B'][0],SIZES['70-72B'][0]
    assert {a.choice for a,_ in choose_adapter(small)} == {*METHODS}
    best = {p: choose_adapter(small, 'h200', p)[0][0].choice for p in ('quality', 'speed', 'memory')}
    assert best == dict(quality='full', speed='lora', memory='qlora')
    assert choose_adapter(large, 'a100', 'quality')[0][0].choice == 'qlora'
    assert not any(f for _,f in choose_adapter(large, 't4')) # nothing fits, and nothing is said to
    with pytest.raises(FtkitError, match='priority'): choose_adapter(small, priority='luck')
    with pytest.raises(FtkitError, match="gpu 'gtx'"): choose_adapter(small, 'gtx')

def test_adapters_are_counted_as_they_are_trained():
    "32 bits for what is trained, under autocast; on a T4, however it is spelt, fp16; options go where they belong"
    small = SIZES['1-3B'][0]
    said = {a.choice: ' '.join(text for text,_ in a.reasons + a.warnings) for a,_ in choose_adapter(small, 'l4')}
    assert 'fp32 weights, autocast to bf16' in said['full'] and 'bf16 weights, autocast to bf16' in said['lora']
    for name in ('t4', 'T4'):
        said = ' '.join(text for a,_ in choose_adapter(small, name) for text,_ in a.reasons + a.warnings)
        assert 'autocast to fp16, efficient' in said and 'bf16' not in said
    found = choose_adapter(small, 'l4', lora=dict(r=64), upcast=True)
    assert [f is None for _,f in found] == [False]*3 and any('rank 64' in t for a,_ in found for t,_ in a.reasons)

def test_what_does_not_fit_is_a_warning():
    for a,fit in choose_adapter(SIZES['7-8B'][1], 't4'):
        assert any('does not fit' in t for t,_ in a.warnings) == (fit.verdict == 'does not fit')
        assert not any('does not fit' in t for t,_ in a.reasons)

def test_adapters_that_are_not_counted_come_last():
    moe = SIZES['1-3B'][0] | dict(model_type='mixtral', num_local_experts=4, num_experts_per_tok=2)
    found = choose_adapter(moe, 'h200')
    assert [(a.choice, f is None) for a,f in found] == [('full', False), ('lora', True), ('qlora', True)]
    assert all('experts share' in a.warnings[-1][0] for a,_ in found[1:])

def test_the_frameworks_are_those_of_the_notes(shared):
    lines = next((shared.parent/'seeds').glob('004*')).read_text().split('\n')[62:73]
    yes = '\u00e2\u0153' # how a tick of the table begins
    cells = {re.search(r'\[(.+?)\]', line).group(1): [cell.strip().startswith(yes) for cell in line.split('|')[2:9]]
             for line in lines}
    assert {name: [*row.values()] for name,row in FRAMEWORKS.items()} == cells

@pytest.mark.parametrize('wrong', [lambda: choose_approach(examples=True), lambda: choose_approach(examples=-1),
    lambda: choose_approach(strict=3), lambda: choose_method(examples=5), lambda: choose_data('task', 'x'),
    lambda: choose_data('task', True), lambda: choose_data(['task']), lambda: choose_framework(['rl']),
    lambda: choose_base(scores=[1]), lambda: choose_adapter({}), lambda: choose_adapter(5)])
def test_odd_facts_are_refused(wrong):
    with pytest.raises(FtkitError): wrong()

def test_models_data_and_frameworks():
    assert all(a.choice != 'Qwen/Qwen2.5-3B' for a in choose_base(commercial=True))
    for budget,there in (('large', True), ('small', False)):
        assert any('70B' in a.choice for a in choose_base(budget=budget)) == there
    assert choose_base(scores={'Qwen/Qwen2.5-0.5B': 1.})[0].choice == 'Qwen/Qwen2.5-0.5B'
    assert choose_data('task', 99).warnings and not choose_data('task', 100).warnings
    assert len(FRAMEWORKS) == 11 and [a.choice for a in choose_framework(*FRAMEWORKS['TRL'])] == ['TRL', 'Axolotl']
    for f,args in ((choose_data, ('luck',)), (choose_base, (False, 'none')), (choose_framework, ('luck',))):
        with pytest.raises(FtkitError): f(*args)
    with pytest.raises(FtkitError, match='no fact'): choose_method(luck=True)
    assert advise([], {}) == []
