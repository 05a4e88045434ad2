"Every objective through the trainer: against TRL's trainers, packed against padded, accumulated, checkpointed, resumed"
from functools import partial
import pytest, torch
from ftkit.chat import set_template
from ftkit.dpo import VARIANTS
from ftkit.objectives import OBJECTIVES
from ftkit.tasks import rows
from ftkit.tiny import tiny
from ftkit.train import train

STEPS = 20
PAIRED = 'reward', 'dpo', 'orpo', 'cpo', 'simpo'
ANSWERED = *PAIRED, 'kto'

def said(text): return [dict(role='assistant', content=text)]

def pairs(n=160):
    "Right answers, and those of other rows with a word more"
    made = rows(n)
    return [dict(prompt=r['messages'][:1], chosen=r['messages'][1:],
                 rejected=said(f'{other["messages"][1]["content"]} no')) for r,other in zip(made, [made[-1], *made])]

def after_one_token(pairs):
    "As texts, after a prompt of one token"
    return [dict(prompt='a', **{side: p[side][0]['content'] for side in ('chosen', 'rejected')}) for p in pairs]

def answers(n=160):
    return [dict(prompt=p['prompt'], completion=p[side], label=side == 'chosen')
            for p in pairs(n//2) for side in ('chosen', 'rejected')]

def data_for(objective, n=160): return rows(n) if objective == 'sft' else answers(n) if objective == 'kto' else pairs(n)

def start(objective='dpo', adapter=None):
    "A random model with a head for the objective, and its tokenizer"
    from transformers import AutoModelForSequenceClassification
    tok,model = tiny()
    set_template(tok)
    torch.manual_seed(0)
    if objective == 'reward':
        model.config.num_labels,model.config.pad_token_id = 1,tok.pad_token_id
        model = AutoModelForSequenceClassification.from_config(model.config)
    return (adapted(model, objective) if adapter else model), tok

def adapted(model, objective='dpo', r=4):
    from peft import LoraConfig, get_peft_model
    kind = 'SEQ_CLS' if objective == 'reward' else 'CAUSAL_LM'
    return get_peft_model(model, LoraConfig(task_type=kind, r=r, target_modules='all-linear'))

def run(tmp_path, objective, adapter=None, data=None, name='run', **options):
    settings = dict(max_steps=STEPS, learning_rate=1e-3, save_strategy='no') | options
    return train(*start(objective, adapter), data or data_for(objective), objective, out=tmp_path/name, **settings)

def column(run, name): return torch.tensor([e[name] for e in run.log if name in e and 'loss' in e])

# against TRL's trainers

TOKEN,APO = dict(sft_average='token'),dict(loss_type='apo_zero_unpaired')
CASES = {'reward': {}, 'reward centred': dict(center_rewards_coefficient=.01),
         'kto': dict(train_sampling_strategy='sequential'),
         'kto apo_zero_unpaired': APO, 'kto weighted': dict(desirable_weight=1.5, **APO),
         'orpo': TOKEN, 'cpo': TOKEN,
         'cpo hinge': dict(loss_type='hinge', **TOKEN), 'cpo ipo': dict(loss_type='ipo', **TOKEN), 'simpo': {}}
CASES |= {f'dpo {name}': dict(loss_type=name, label_smoothing=.1*(name in ('exo_pair', 'robust'))) for name in VARIANTS}
CASES |= {'dpo ld': dict(ld_alpha=.3), 'dpo js': dict(f_divergence_type='js_divergence'),
          'dpo mixed': dict(loss_type=['sigmoid', 'sft'], loss_weights=[1., .5])}

@pytest.mark.parametrize('adapter', [None, 'lora'], ids=['full', 'lora'])
@pytest.mark.parametrize('case', CASES)
def test_every_step_equals_trls(tmp_path, case, adapter):
    "20 steps: losses within 1e-4, metrics of the same name within 1e-3"
    objective,options = case.split()[0],CASES[case]
    # TRL's ORPO trains the prompt too: with one token, which nothing predicts, that is no difference
    data = after_one_token(pairs()) if objective == 'orpo' else None
    ours,theirs = (run(tmp_path, objective, adapter, data, name=e, engine=e, **options) for e in ('ftkit', 'trl'))
    assert len(column(ours, 'loss')) == STEPS
    torch.testing.assert_close(column(ours, 'loss'), column(theirs, 'loss'), atol=1e-4, rtol=0)
    shared = [k for k,v in ours.log[0].items() if k in theirs.log[0] and isinstance(v, float)]
    assert len(shared) >= 6
    for name in shared:
        # the first steps are made at a rate of nearly 0: which answer is worth more is a matter of rounding
        a,b = (column(r, name)[4*(name == 'rewards/accuracies'):] for r in (ours, theirs))
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4, msg=partial('{}: {}'.format, name))

def test_the_rows_trl_makes_itself_teach_the_same(tmp_path):
    "TRL's DPOTrainer on messages, with its own tokens"
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    model,tok = start('dpo', 'lora')
    ours = run(tmp_path, 'dpo', 'lora')
    settings = DPOConfig(str(tmp_path/'trl'), max_steps=STEPS, learning_rate=1e-3, warmup_steps=5, logging_steps=1,
        seed=0, per_device_train_batch_size=8, use_cpu=True, bf16=False, save_strategy='no', report_to='none',
        disable_tqdm=True, gradient_checkpointing=False)
    trainer = DPOTrainer(model, args=settings, processing_class=tok, train_dataset=Dataset.from_list(pairs()))
    trainer.train()
    theirs = torch.tensor([e['loss'] for e in trainer.state.log_history if 'loss' in e])
    # TRL trains what a template writes after an answer, a line break here, too
    assert (column(ours, 'loss')-theirs).abs().max() < .05

# laws

FIRST = {'dpo': .6931471806, 'kto': .5}

@pytest.mark.parametrize('objective', FIRST)
def test_first_steps_cost_what_the_formula_says(tmp_path, objective):
    for adapter in (None, 'lora'):
        first = run(tmp_path, objective, adapter, name=f'{adapter}', max_steps=1).log[0]['loss']
        assert abs(first-FIRST[objective]) < 1e-6

def gradients(objective, data, size, checkpointing=False, **options):
    "Gradients of one step, in micro-batches of a size"
    obj = OBJECTIVES[objective]
    model,tok = start(objective, 'lora')
    if checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.enable_input_require_grads()
    with torch.no_grad():
        for name,p in model.named_parameters():
            if 'lora_B' in name: p.normal_(std=.05, generator=torch.Generator().manual_seed(1))
    ds = list(obj.prepare(tok, data, max_length=options.get('max_length')))
    collate,top = obj.collate(tok, model, options.get('packing')),obj.head(model)
    batches = [collate(ds[k:k+size]) for k in range(0, len(ds), size)]
    from ftkit.reference import answer_parts
    from ftkit.train import count
    for part in (p for b in batches for p in (answer_parts(b) if obj.reference else [])):
        part['ref_logps'] = -torch.ones(len(part['targets']))*5
    model.train()
    for batch in batches: (obj.loss(model, top, batch).losses.sum()/sum(map(count, batches))).backward()
    found = {n: p.grad for n,p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.abs().max() > 0 for g in found.values())
    return torch.cat([g.flatten() for g in found.values()])

def equal(a, b, limit=1e-5):
    "Relative to the largest: float32 adds up in another order"
    assert (a-b).abs().max() <= limit*b.abs().max()

@pytest.mark.parametrize('objective', ANSWERED)
def test_packed_equals_padded(objective):
    data = data_for(objective, 24)
    equal(gradients(objective, data, 24), gradients(objective, data, 24, packing=False))

@pytest.mark.parametrize('objective', ['sft', *(o for o in ANSWERED if o != 'kto')])
def test_accumulation_equals_one_batch(objective):
    data = data_for(objective, 32)
    equal(gradients(objective, data, 8), gradients(objective, data, 32))

def test_accumulation_of_kto_without_its_reference_point():
    "With it, each micro-batch has its own, which the page says"
    from dataclasses import replace
    kto = OBJECTIVES['kto']
    OBJECTIVES['apo'] = replace(kto, loss=partial(kto.loss, loss_type='apo_zero_unpaired'))
    try: equal(gradients('apo', answers(32), 8), gradients('apo', answers(32), 32))
    finally: del OBJECTIVES['apo']

@pytest.mark.parametrize('objective', ['sft', *ANSWERED])
def test_checkpointing_changes_nothing(objective):
    data = data_for(objective, 16)
    equal(gradients(objective, data, 16, checkpointing=True), gradients(objective, data, 16), 1e-6)

@pytest.mark.parametrize('objective', ANSWERED)
def test_a_leaking_layout_is_noticed(objective, monkeypatch):
    "The broken twin: trees that see their neighbours are not chosen, and would be wrong"
    from ftkit.answers import AnswerCollator, best_layout
    data,whole,(model,tok) = data_for(objective, 24),AnswerCollator._inputs,start(objective)
    def leaking(self, ids, positions, tree, branch): return whole(self, ids, positions, 0*tree, 0*branch)
    right = gradients(objective, data, 24)
    assert best_layout(model, tok) == 'shared'
    monkeypatch.setattr(AnswerCollator, '_inputs', leaking)
    assert best_layout(model, tok) == 'packed'
    monkeypatch.setattr('ftkit.objectives.best_layout', lambda *_: 'shared')
    assert (gradients(objective, data, 24)-right).abs().max() > 1e-3*right.abs().max()

# references

@pytest.mark.parametrize('objective', ['dpo', 'kto'])
def test_references_agree(tmp_path, objective, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HOME', str(tmp_path/'cache'))
    for adapter,ways in ((None, ('precomputed', 'copy')), ('lora', ('adapter', 'precomputed', 'copy'))):
        held = data_for(objective, 24)
        first,*others = [run(tmp_path, objective, adapter, reference=way, name=f'{adapter}{way}', eval_data=held)
                         for way in ways]
        assert first.record['reference'] == ways[0]
        for other in others:
            for name in ('loss', 'rewards/chosen', 'rewards/rejected'):
                torch.testing.assert_close(column(first, name), column(other, name), atol=2e-5, rtol=1e-5)
            assert abs(first.metrics['eval_loss']-other.metrics['eval_loss']) < 2e-5
    # rows to train and to hold out, with and without an adapter
    assert len(list((tmp_path/'cache').rglob('*.arrow'))) == 4

def test_a_trained_adapter_is_its_own_reference(tmp_path):
    "DPO after SFT on the same adapter begins at ln 2, and does not measure from the model before SFT"
    from ftkit.reference import Reference
    model,tok = start('dpo', 'lora')
    train(model, tok, rows(64), out=tmp_path/'sft', max_steps=10, learning_rate=1e-2)
    assert Reference(model).how == 'precomputed'
    first = train(model, tok, pairs(), 'dpo', out=tmp_path/'dpo', max_steps=1).log[0]['loss']
    assert abs(first-FIRST['dpo']) < 1e-6
    wrong = train(model, tok, pairs(), 'dpo', out=tmp_path/'off', max_steps=1, reference='adapter').log[0]['loss']
    assert abs(wrong-FIRST['dpo']) > 1e-3
