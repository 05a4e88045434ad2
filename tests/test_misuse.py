"Training asked for in ways that cannot work, or that looked as if they did"
import pytest, torch
from ftkit.core import FtkitError
from ftkit.evaluate import exact_match, pair_scores
from ftkit.generate import generate, read_samples, samples
from ftkit.models import load_model, load_tokenizer
from ftkit.objectives import OBJECTIVES
from ftkit.tasks import rows
from ftkit.train import run_files, train
from test_objectives import answers, column, pairs, run, said, start

def several_turns(p):
    "An answer in two turns, with a question between that is not trained"
    return p | dict(chosen=[*said('Let me see.'), dict(role='user', content='Well?'), *p['chosen']])

@pytest.mark.parametrize('objective', ['dpo', 'orpo', 'reward'])
@pytest.mark.parametrize('which', ['all', 'one'])
def test_answers_of_several_turns(tmp_path, objective, which):
    data = [several_turns(p) if which == 'all' or i == 3 else p for i,p in enumerate(pairs(24))]
    found = run(tmp_path, objective, 'lora', data, max_steps=2)
    assert column(found, 'loss').isfinite().all()
    model,tok = start(objective)
    obj = OBJECTIVES[objective]
    ds = obj.prepare(tok, data)
    gaps = sum(len(r['chosen_ids']) > sum(r['chosen_mask']) for r in ds)
    assert len(ds) == 24 and gaps == (24 if which == 'all' else 1)

def test_kto_with_turns_and_a_reference_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HOME', str(tmp_path/'cache'))
    between = [*said('Hm.'), dict(role='user', content='So?')]
    data = [a | dict(completion=between + a['completion']) for a in answers(24)]
    one,two = (run(tmp_path, 'kto', 'lora', data, max_steps=2, reference=r, name=r) for r in ('adapter', 'precomputed'))
    torch.testing.assert_close(column(one, 'loss'), column(two, 'loss'), atol=1e-5, rtol=0)

def test_mismatched_answers_of_kto_fit_and_belong_to_other_prompts(capsys):
    model,tok = start('kto')
    # all good answers first, then bad ones to the same prompts: half the rows away is one's own prompt
    data = sorted(answers(24), key=lambda a: not a['label'])
    ds = OBJECTIVES['kto'].prepare(tok, data, max_length=46)
    prompts = {tuple(r['completion_ids']): tuple(r['prompt_ids']) for r in ds}
    assert max(len(r['prompt_ids']) + len(r['KL_completion_ids']) for r in ds) <= 46
    assert 'compared with another answer' not in capsys.readouterr().out
    again = OBJECTIVES['kto'].prepare(tok, ds, max_length=40)
    assert max(len(r['prompt_ids']) + len(r['KL_completion_ids']) for r in again) <= 40
    short = OBJECTIVES['kto'].prepare(tok, data)
    own = [tuple(prompts.get(tuple(r['KL_completion_ids']), ())) == tuple(r['prompt_ids']) for r in short]
    assert not any(own)

def test_metrics_of_an_evaluation_do_not_depend_on_its_batches(tmp_path):
    held = pairs(13)
    one,two = (run(tmp_path, 'reward', 'lora', max_steps=1, eval_data=held, per_device_eval_batch_size=n, name=str(n))
               for n in (13, 12))
    for name in ('eval_accuracy', 'eval_margin', 'eval_mean_reward', 'eval_loss'):
        assert abs(one.log[0][name]-two.log[0][name]) < 1e-6

# resuming

def resumed(tmp_path, objective='dpo', **changes):
    options = dict(max_steps=6, save_strategy='steps', save_steps=3) | changes
    return run(tmp_path, objective, 'lora', **options)

def test_resuming_another_run_is_refused(tmp_path):
    resumed(tmp_path)
    for changes,what in ((dict(data=pairs(40)), 'another data'), (dict(reference='copy'), 'another reference')):
        with pytest.raises(FtkitError, match=what): resumed(tmp_path, resume=True, max_steps=9, **changes)
    with pytest.raises(FtkitError, match='another objective'): resumed(tmp_path, 'orpo', resume=True, max_steps=9)

def test_resuming_with_a_model_that_has_moved_on_is_refused(tmp_path):
    "As when a cell of a notebook is run again"
    model,tok = start('dpo', 'lora')
    options = dict(objective='dpo', out=tmp_path/'run', learning_rate=1e-2, save_strategy='steps', save_steps=3)
    train(model, tok, pairs(), max_steps=6, **options)
    more = dict(max_steps=9, resume=True, **options)
    with pytest.raises(FtkitError, match='load it anew'): train(model, tok, pairs(), **more)
    assert len(train(*start('dpo', 'lora'), pairs(), **more).log) >= 9

def test_a_finished_run_is_not_trained_further(tmp_path):
    first = resumed(tmp_path)
    model,tok = start('dpo', 'lora')
    again = train(model, tok, pairs(), 'dpo', out=tmp_path/'run', max_steps=6, learning_rate=1e-3, resume=True,
                  save_strategy='steps', save_steps=3)
    assert again.log == first.log and again.record['step'] == 6
    from safetensors.torch import load_file
    saved = load_file(again.adapter/'adapter_model.safetensors')
    own = {n.replace('.default', ''): p for n,p in model.named_parameters() if 'lora' in n}
    assert saved.keys() <= own.keys() and all(torch.equal(saved[n], own[n]) for n in saved)

def test_patience_goes_on_counting_after_a_kill(tmp_path):
    "The same evaluations with and without an interruption"
    import shutil
    held = [p | dict(chosen=p['rejected'], rejected=p['chosen']) for p in pairs(24)]
    options = dict(max_steps=20, learning_rate=5e-3, warmup_steps=0, patience=2, eval_data=held, save_strategy='steps',
                   eval_steps=2, save_steps=2, save_total_limit=10)
    whole = run(tmp_path, 'dpo', 'lora', **options)
    last = whole.log[-1]['step']
    folder = tmp_path/'run'
    for gone in [folder/'adapter', *(folder/f'checkpoint-{s}' for s in range(last, 21))]: shutil.rmtree(gone, True)
    again = run(tmp_path, 'dpo', 'lora', resume=True, **options)
    steps = lambda r: [e['step'] for e in r.log if 'eval_loss' in e]
    assert steps(again) == steps(whole) and steps(whole)[-1] < 20

# what is asked for

@pytest.mark.parametrize('objective,options,says', [
    ('dpo', dict(label_smoothing_factor=.4), 'label_smoothing_factor is for sft'),
    ('cpo', dict(loss_type='hinge', label_smoothing=.4), 'label_smoothing changes nothing in hinge'),
    ('cpo', dict(simpo_gamma=5.), 'simpo_gamma changes nothing'),
    ('sft', dict(resume_from_checkpoint='nowhere'), 'here it is called resume=True'),
    ('sft', dict(output_dir='there'), 'here it is called out'),
    ('sft', dict(hub_token='hf_planted'), 'a secret must not be'),
    ('orpo', dict(engine='trl'), "sft_average='token'")])
def test_options_that_would_do_nothing(tmp_path, objective, options, says):
    with pytest.raises(FtkitError, match=says): run(tmp_path, objective, max_steps=1, **options)
    assert not run_files(tmp_path/'run')

def test_trl_is_not_given_a_head_that_its_loss_cannot_read(tmp_path):
    tok = load_tokenizer('embedded')
    with pytest.raises(FtkitError, match='rows of new tokens'):
        train(load_model('embedded', tok), tok, rows(8), out=tmp_path/'run', engine='trl', max_steps=1)
    plain = load_model('embedded', tok, trainable_token_indices=None)
    assert train(plain, tok, rows(8), out=tmp_path/'run', engine='trl', max_steps=1).log

def test_trl_is_not_given_a_trained_adapter_as_its_own_reference(tmp_path):
    model,tok = start('dpo', 'lora')
    train(model, tok, rows(32), out=tmp_path/'sft', max_steps=3, learning_rate=1e-2)
    with pytest.raises(FtkitError, match='TRL would measure'):
        train(model, tok, pairs(), 'dpo', out=tmp_path/'dpo', reference='adapter', engine='trl', max_steps=1)

def test_full_sft_starts_at_a_rate_for_all_weights(tmp_path):
    model,tok = start('sft')
    assert train(model, tok, rows(16), out=tmp_path/'run', max_steps=1).record['options']['learning_rate'] == 2e-5

DATA = [('sft', {'train': rows(2)}, 'the data have parts, train'), ('sft', ['a', 'b'], 'row 1 is a str'),
        ('dpo', {'train': pairs(2)}, 'the data have parts'), ('sft', [], 'empty'),
        ('sft', [dict(input_ids=[1, 2])], 'no labels'),
        ('kto', [a | dict(label='good') for a in answers(4)], "label 'good' is not true or false"),
        ('kto', [*answers(4), answers(4)[0] | dict(label=None)], 'row 5 has no label'),
        ('reward', [*(p | dict(margin=1.) for p in pairs(4)), pairs(4)[0] | dict(margin=None)], 'row 5 has no margin')]

@pytest.mark.parametrize('objective,data,says', DATA, ids=[d[2] for d in DATA])
def test_data_that_are_none(tmp_path, objective, data, says):
    model,tok = start(objective)
    with pytest.raises(FtkitError, match=says): train(model, tok, data, objective, out=tmp_path/'run', max_steps=1)
    with pytest.raises(FtkitError, match=says):
        train(model, tok, rows(4) if objective == 'sft' else answers(4) if objective == 'kto' else pairs(4), objective,
              out=tmp_path/'run', max_steps=1, eval_data=data)

def test_prepared_rows_in_a_list_and_rows_of_a_generator(tmp_path):
    model,tok = start('dpo')
    ds = OBJECTIVES['dpo'].prepare(tok, pairs(8))
    assert train(model, tok, list(ds), 'dpo', out=tmp_path/'list', max_steps=1).record['data']['rows'] == 8
    assert train(*start('sft'), (r for r in rows(8)), out=tmp_path/'g', max_steps=1).record['data']['rows'] == 8

def test_models_that_cannot_learn_this(tmp_path):
    judge,tok = start('reward')
    for objective,data in (('dpo', pairs(4)), ('sft', rows(4))):
        with pytest.raises(FtkitError, match='no vocabulary|load it without'): train(
            judge, tok, data, objective, out=tmp_path/'run', max_steps=1)
    run(tmp_path, 'sft', max_steps=1)
    frozen = load_model('embedded', (etok := load_tokenizer('embedded')), adapter=None)
    with pytest.raises(FtkitError, match='no weight is trained'):
        train(frozen, etok, rows(4), out=tmp_path/'run', overwrite=True, max_steps=1)
    assert (tmp_path/'run'/'adapter').exists()
    message = rows(1)[0]['messages'][0]
    for ask,says in ((lambda: generate(judge, tok, ['?']), 'no words'),
                     (lambda: generate(frozen, etok, [message]), 'list of messages'),
                     (lambda: exact_match(frozen, etok, []), 'empty'),
                     (lambda: exact_match(frozen, etok, [dict(a=1)]), 'no messages'),
                     (lambda: samples(etok, ['?'], every=0), 'at least one'),
                     (lambda: samples(etok, []), 'at least one')):
        with pytest.raises(FtkitError, match=says): ask()

def test_a_wrong_option_for_a_stream_deletes_nothing(tmp_path, capsys):
    from datasets import Dataset
    run(tmp_path, 'sft', max_steps=1)
    stream = Dataset.from_list([dict(messages=r['messages']) for r in rows(64)]).to_iterable_dataset()
    again = dict(out=tmp_path/'run', overwrite=True, max_steps=1)
    with pytest.raises(FtkitError): train(*start('sft'), stream, loss_type='bad', **again)
    assert (tmp_path/'run'/'adapter').exists()
    train(*start('sft'), stream, out=tmp_path/'s', max_steps=1, max_length=40, per_device_train_batch_size=2)
    import gc; gc.collect()
    assert 'rows of the stream were too long' in capsys.readouterr().out
    with pytest.raises(FtkitError, match='no row of the stream'):
        train(*start('sft'), stream, out=tmp_path/'none', max_steps=1, max_length=5)

def test_one_callback_and_an_early_end(tmp_path):
    model,tok = start('dpo', 'lora')
    held = [p | dict(chosen=p['rejected'], rejected=p['chosen']) for p in pairs(24)]
    ask = samples(tok, ['?'], every=30, max_new_tokens=2)
    found = train(model, tok, pairs(), 'dpo', out=tmp_path/'run', max_steps=40, learning_rate=5e-3, warmup_steps=0,
                  patience=1, eval_data=held, eval_steps=2, save_steps=2, callbacks=ask)
    steps = [s['step'] for s in read_samples(found.path)]
    assert steps[0] == 0 and 0 < steps[-1] < 30

def test_wrapped_rows_are_evaluated_whole(tmp_path):
    texts = [dict(text='one two three '*60)]*4
    log = run(tmp_path, 'sft', data=texts, max_steps=1, packing='wrapped', max_length=64, eval_data=texts).log
    assert log[0]['eval_loss'] > 0

def test_a_model_is_as_it_was_after_bf16(tmp_path):
    "Not in autocast for ever"
    model,tok = start('dpo', 'lora')
    ids = torch.arange(8)[None]
    train(model, tok, pairs(16), 'dpo', out=tmp_path/'run', max_steps=1, learning_rate=1e-9, precision='bf16')
    fresh,_ = start('dpo', 'lora')
    with torch.no_grad(): a,b = (m.eval()(input_ids=ids).logits for m in (model, fresh))
    assert (a-b).abs().max() < 1e-6

def test_every_pair_gets_its_score():
    tok = load_tokenizer('embedded')
    model = load_model('embedded', tok, adapter=None)
    same = [*pairs(4), pairs(4)[0] | dict(rejected=pairs(4)[0]['chosen'])]
    chosen,rejected = pair_scores(model, tok, same)
    assert len(chosen) == 5 and abs(chosen[4]-rejected[4]) < 1e-4

def test_an_adapter_on_the_head_is_not_taken_for_none():
    from peft import LoraConfig, get_peft_model
    from ftkit.reference import changes_nothing, _weights_hash
    model,tok = start('sft')
    model = get_peft_model(model, LoraConfig(task_type='CAUSAL_LM', target_modules=['lm_head']))
    assert changes_nothing(model)
    with torch.no_grad():
        for n,p in model.named_parameters():
            if 'lora_B' in n: p.normal_()
    assert not changes_nothing(model)
    one = _weights_hash(model)
    model.peft_config['default'].lora_alpha *= 2
    assert _weights_hash(model) != one
